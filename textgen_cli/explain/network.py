"""A network as explanations need it: rows in, what their targets get out, with gradients to the embeddings if wanted.

Owns batching, memory and the ways of the families. Embeddings are exchanged where they are looked up, so that a
network sees its ids too, which some need for positions and padding. Only the logits of targets are made.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from textgen_cli.errors import ModelError, OutOfMemory
from textgen_cli.explain.case import Measure, Row, Target
from textgen_cli.model import device
from textgen_cli.model.head import Head
from textgen_cli.model.load import Model
from textgen_cli.text.windows import batches

TOKENS = 2048  # of a batch
BACKWARD = 512  # of a batch whose activations are kept for a gradient: some 0.5 MB each in a small model
LOGITS = 12_000_000  # of a batch, at its targets: some 50 MB, held a few times over


class Network:
    """One loaded model, frozen: gradients go to its inputs alone."""

    def __init__(self, model: Model) -> None:
        self.model, self.net = model, model.net.requires_grad_(False)
        self.seq2seq = model.family == "seq2seq"
        self.labels = model.family in ("sequence-classification", "token-classification")
        two_halves = self.net.config.is_encoder_decoder
        encoder = (self.net if self.seq2seq else self.net.base_model).get_encoder() if two_halves else None
        own = getattr(encoder, "embed_tokens", None)  # there may be a scale in it that the shared table lacks
        self.embedding = self.net.get_input_embeddings() if own is None else own
        takes = inspect.signature(self.net.forward).parameters
        self.options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        self.typed = "token_type_ids" in takes
        self.head = None if self.labels else self._head()
        if model.family == "sequence-classification" and self.net.config.pad_token_id is None:
            # No row is ever padded here; without a padding token the library refuses several rows.
            self.net.config.pad_token_id = -1

    def _head(self) -> Head:
        net = self.net
        trunk = [net.get_encoder(), net.get_decoder()] if self.seq2seq else [net.base_model]
        ids = torch.arange(1, 9, device=net.device)[None] % self.embedding.weight.shape[0]  # (1, T)
        probe = {"input_ids": ids} | ({"decoder_input_ids": ids} if self.seq2seq else {})
        head = Head(net, trunk, probe)
        row = Row(tuple(ids[0].tolist()), (), tuple(ids[0].tolist()) if self.seq2seq else ())
        head.prove(lambda: self._trunk(self.inputs([row])))
        return head

    # --- rows to tensors

    def inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The tensors of rows of one shape, (B, S) each."""
        where = self.net.device
        ids = torch.tensor([row.ids for row in rows], device=where)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.typed and rows[0].types:
            found["token_type_ids"] = torch.tensor([row.types for row in rows], device=where)
        if self.seq2seq:
            found["decoder_input_ids"] = torch.tensor([row.decoder for row in rows], device=where)
        return found | self.options

    @torch.no_grad()
    def embed(self, row: Row) -> torch.Tensor:
        """The embeddings of a row's tokens, (S, D), as the network looks them up."""
        found: torch.Tensor = self.embedding(torch.tensor([row.ids], device=self.net.device))[0]
        return found

    @torch.no_grad()
    def neutral(self) -> torch.Tensor:
        """The embedding (D,) of the token that says least: of masks, padding or ends; zeros where there is none.

        Zeros are no input that a network knows: in deep ones with root mean square norms, no gradient stands there.
        """
        backend = self.model.tokenizer.backend
        known = (backend.mask_token_id, backend.pad_token_id, backend.eos_token_id)
        token = next((token for token in known if token is not None), None)
        if token is None:
            return torch.zeros_like(self.embed(Row((0,), ()))[0])
        return self.embed(Row((token,), ()))[0]

    def parts(self, rows: Sequence[Row], tokens: int = TOKENS) -> Iterator[list[int]]:
        """Numbers of rows that may be computed together: of one shape, so that none is padded."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            groups[len(row.ids), len(row.decoder), len(row.targets)].append(number)
        width = self.head.vocabulary if self.head else 1
        for (size, decoder, targets), group in groups.items():
            whole = targets if self.head is None or self.head.splits else max(size, decoder)
            most = max(1, LOGITS // max(1, whole * width))
            for part in batches([size + decoder] * len(group), tokens, most):
                yield [group[at] for at in part]

    # --- tensors to scores

    def scores(
        self, rows: Sequence[Row], measure: Measure, embeddings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the targets of rows of one shape get, (B, targets); `embeddings` (B, S, D) in place of their own.

        Raises ModelError E-NAN where that is no number, OutOfMemory.
        """
        with self._memory():
            found = measured(self.logits(rows, embeddings), rows, measure)
        if not found.isfinite().all():
            raise ModelError("E-NAN", self.model.name, "logits are not finite")
        return found

    def logits(self, rows: Sequence[Row], embeddings: torch.Tensor | None = None) -> torch.Tensor:
        """The logits at the targets of rows of one shape, (B, targets, V) in float32."""
        inputs = self.inputs(rows)
        at = torch.tensor([[target.place for target in row.targets] for row in rows], device=self.net.device)
        every = torch.arange(len(rows), device=self.net.device)[:, None]
        with self.embedded(embeddings):
            if self.head is None or not self.head.splits:
                whole: torch.Tensor = self.net(**inputs).logits.float()
                return whole[:, None] if whole.dim() == 2 else whole[every, at]
            hidden = self._trunk(inputs)[every, at]  # (B, targets, D)
        told: torch.Tensor = self.head.apart(hidden.flatten(0, 1)).float()
        return told.view(*hidden.shape[:2], -1)

    def _trunk(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The last hidden states, (B, T, D)."""
        if not self.seq2seq:
            found: torch.Tensor = self.net.base_model(**inputs)[0]
            return found
        mask = inputs["attention_mask"]
        memory = self.net.get_encoder()(input_ids=inputs["input_ids"], attention_mask=mask)[0]
        told: torch.Tensor = self.net.get_decoder()(
            input_ids=inputs["decoder_input_ids"], encoder_hidden_states=memory, encoder_attention_mask=mask,
            use_cache=False,
        )[0]  # fmt: skip
        return told

    @contextmanager
    def embedded(self, embeddings: torch.Tensor | None) -> Iterator[None]:
        """Let the first look-up give these embeddings: an encoder-decoder's second one is its decoder's."""
        if embeddings is None:
            yield
            return
        waiting = [embeddings]

        def exchange(*_: Any) -> torch.Tensor | None:
            return waiting.pop() if waiting else None

        handle = self.embedding.register_forward_hook(exchange)
        try:
            yield
        finally:
            handle.remove()
        if waiting:
            raise ModelError("E-EXPLAIN", self.model.name, "looks its tokens up in a way of its own")

    @contextmanager
    def _memory(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not device.out_of_memory(error):
                raise
            device.release(self.net.device)
            raise OutOfMemory("E-MEMORY", self.model.name, "an explanation does not fit") from error

    @torch.no_grad()
    def runners_up(self, rows: Sequence[Row]) -> list[Row]:
        """Each row with the likeliest other answer in place of every target's own, and the opposite sign."""
        found: list[Row] = list(rows)
        for part in self.parts(rows):
            members = [rows[number] for number in part]
            logits = self.logits(members)
            own = torch.tensor([[t.token for t in row.targets] for row in members], device=logits.device)
            others = logits.scatter(-1, own[..., None], -torch.inf).argmax(-1).tolist()
            for number, row, tokens in zip(part, members, others, strict=True):
                targets = [
                    Target(t.place, other, t.own) for t, other in zip(row.targets, tokens, strict=True)
                ]
                found[number] = replace(row, targets=tuple(targets), sign=-row.sign)
        return found


def measured(logits: torch.Tensor, rows: Sequence[Row], measure: Measure) -> torch.Tensor:
    """What targets get of logits (B, targets, V): (B, targets)."""
    own = torch.tensor([[t.token for t in row.targets] for row in rows], device=logits.device)[..., None]
    if measure in ("value", "logit"):
        return logits.gather(-1, own)[..., 0]
    if measure == "log_probability":
        return logits.log_softmax(-1).gather(-1, own)[..., 0]
    others = logits.scatter(-1, own, -torch.inf).logsumexp(-1)
    return logits.gather(-1, own)[..., 0] - others
