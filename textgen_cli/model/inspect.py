"""What is known of a model before it is loaded, or even fetched: from its config and the headers of its weights.

Owns where each kind of source keeps these; what follows from them stands in `anatomy.py`. It reads no weight,
imports no library of models, and fetches nothing but a wheel of a package index, which cannot be read in parts.
"""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from textgen_cli.config import DEFAULT_MODEL, ModelConfig
from textgen_cli.errors import ModelError, UsageError
from textgen_cli.events import Report
from textgen_cli.model import anatomy, cache, gguf, gguf_words, lock, packaged, peek, wheel
from textgen_cli.model.anatomy import Sizes, Weights
from textgen_cli.model.catalog import CATALOG
from textgen_cli.model.check import LOADABLE, check_config, check_folder
from textgen_cli.model.family import Family, family_of
from textgen_cli.model.selection import Wanted, choose
from textgen_cli.model.source import Kind, Source, locate, parse
from textgen_cli.model.weights import ADAPTER, INDEX, SINGLE, Tensor, no_weights, read_header, read_json

CARD = "README.md"
CARD_LIMIT = 1 << 20  # bytes
CONFIG = "config.json"
TOKENIZER = "tokenizer_config.json"
TEMPLATES = frozenset({"chat_template.jinja", "chat_template.json"})


@dataclass(frozen=True)
class Facts:
    """What is known of a model."""

    model: str  # as it was asked for
    source: str
    revision: str
    config: Mapping[str, Any]  # in the words of config.json
    family: Family
    licence: str | None  # as the model's card or file names it; None: it does not
    template: bool  # whether there is a chat template
    files: tuple[tuple[str, int], ...]  # names and bytes of what loading needs
    weights: Weights | None  # None: they are stored in a form that does not tell them

    @property
    def sizes(self) -> Sizes | None:
        """What the config tells of them."""
        return anatomy.sizes(self.config)

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        inner = anatomy.inner_config(self.config)
        own = {
            "model": self.model,
            "source": self.source,
            "revision": self.revision or None,
            "architecture": next(iter(self.config.get("architectures") or []), None),
            "type": self.config.get("model_type"),
            "family": self.family,
            "licence": self.licence,
            "context": anatomy.context_of(self.config),
            "vocabulary": inner.get("vocab_size"),
            "chat_template": self.template,
        }
        found = self.sizes
        own |= found.fields() if found else {}
        own |= self._weights() | (self._running(found) if found else {})
        files = [{"name": name, "size": size} for name, size in self.files]
        return own | {"bytes": sum(size for _, size in self.files), "files": files}

    def _weights(self) -> dict[str, Any]:
        if self.weights is None:
            return {"parameters": None}
        parts = {name: number for name, number in self.weights.parts.items() if number or name != "other"}
        active = self.weights.active(self.sizes)
        parts |= {} if active == self.weights.total else {"active": active}
        return {
            "parameters": {"total": self.weights.total, **parts},
            "tied": self.weights.tied,
            "stored_bytes": dict(self.weights.stored),
            "weight_bytes": anatomy.weight_bytes(self.weights),
        }

    def _running(self, found: Sizes) -> dict[str, Any]:
        own: dict[str, Any] = {}
        if self.family in ("causal", "seq2seq"):
            tokens = {"token": 1, "context": found.context}
            own["cache_bytes"] = {
                dtype: {
                    name: anatomy.cache_elements(found, count) * size
                    for name, count in tokens.items()
                    if count
                }
                for dtype, size in (("float32", 4), ("bfloat16", 2))
            }
        if self.weights is not None:
            work: dict[str, Any] = {"token": anatomy.flops(self.weights, found, 1)}
            work |= (
                {"token_at_context": anatomy.flops(self.weights, found, found.context)}
                if found.context
                else {}
            )
            work |= {"source_token": 2 * self.weights.encoder} if found.encoder_layers else {}
            own["flops"] = work | {"formula": anatomy.FORMULA}
        return own


def inspect(config: ModelConfig, report: Report, include: tuple[str, ...] = ()) -> Facts:
    """What is known of a model that a name means; `include`: patterns that choose a GGUF file of a repository.

    Raises UsageError for the name and the patterns; NetworkError, ModelError, SafetyError, OutputError as its source
    does; ModelError E-ARCH for one that textgen does not run.
    """
    if config.locked is not None:
        name, pinned = lock.find(config.locked, config.model, DEFAULT_MODEL)
        at = f"@{pinned.revision}" if pinned.source == "hub" else ""
        config = replace(config, model=name.partition("@")[0] + at if at else name, locked=None)
    source = parse(config.model)
    if include:
        if source.kind != "hub":
            raise UsageError("E-CONFLICT", "--include", "is for models of the Hub")
        return _of_hub_file(_shelf(source, config, report, deep=True), include, config.model)
    return LOOKS[source.kind](source, config, report)


def licence_of(card: bytes) -> str | None:
    """The licence that the head of a model card names."""
    head = re.match(rb"---[ \t]*\r?\n(.*?)\r?\n---", card, re.DOTALL)
    lines = head[1].decode("utf-8", "replace") if head else ""
    names = [
        re.search(
            rf"^{key}:(?:\s*-\s*|[ \t]*\[?[ \t]*)[\"']?([\w.+-]+(?: [\w.+-]+){{0,4}})", lines, re.MULTILINE
        )
        for key in ("license", "license_name")
    ]
    found = [match[1][:60] for match in names if match]
    return found[-1] if found and found[0] == "other" else next(iter(found), None)


def _of_hub(source: Source, config: ModelConfig, report: Report) -> Facts:
    shelf = _shelf(source, config, report)
    if not shelf.files.keys() & {SINGLE, INDEX, ADAPTER} and any(map(_is_gguf, shelf.files)):
        return _of_hub_file(shelf, (), config.model)
    files = shelf.loadable()
    names = {file.name for file in files}
    found = shelf.json(CONFIG, "E-CONFIG")
    if found is None:
        if ADAPTER in names:
            raise no_weights(source.name, names)
        raise ModelError("E-CONFIG", CONFIG, "is not in the repository")
    for notice in check_config(found):
        report(notice)
    family = family_of(found, source.name)
    settings = shelf.json(TOKENIZER, "E-TOKENIZER") or {}
    return Facts(
        model=config.model,
        source=source.kind,
        revision=shelf.cached.commit,
        config=found,
        family=family,
        licence=licence_of(shelf.read(CARD, CARD_LIMIT) or b""),
        template=bool(settings.get("chat_template") or names & TEMPLATES),
        files=tuple((file.name, file.size) for file in files),
        weights=_count(shelf.tensors(report), found, family),
    )


def _shelf(source: Source, config: ModelConfig, report: Report, *, deep: bool = False) -> peek.Shelf:
    return peek.shelf(
        source.name, source.revision, offline=config.offline, report=report, mirror=config.mirror, deep=deep
    )


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def _of_hub_file(shelf: peek.Shelf, include: tuple[str, ...], model: str) -> Facts:
    """The one GGUF file of a repository that is meant."""
    files, _ = choose(shelf.repo, list(shelf.files.values()), Wanted(include or ("*.gguf", "*.GGUF")))
    if not all(_is_gguf(file.name) for file in files):
        raise UsageError("E-CONFLICT", "--include", "with --info and --for it chooses a GGUF file")
    if len(files) > 1:
        fact = f"has {len(files)} GGUF files that can be meant"
        raise UsageError("E-USAGE", shelf.repo, fact, hint=f"--include {shlex.quote(files[0].name)}")
    header, card = shelf.gguf(files[0]), licence_of(shelf.read(CARD, CARD_LIMIT) or b"")
    found = _of_header(header, model, "hub", shelf.cached.commit, ((files[0].name, files[0].size),))
    return replace(found, licence=found.licence or card)


def _of_folder(source: Source, config: ModelConfig, report: Report) -> Facts:
    """A model in a folder, its own or one of the cache."""
    located = locate(config, report)
    checked = check_folder(located.folder)
    for notice in checked.notices:
        report(notice)
    family = family_of(checked.config, located.label)
    tensors: dict[str, Tensor] = {}
    for path in checked.weights:
        tensors |= read_header(path)
    names = {
        path.name for path in located.folder.iterdir() if LOADABLE.fullmatch(path.name) and path.is_file()
    }
    settings = read_json(located.folder / TOKENIZER, "E-TOKENIZER") if TOKENIZER in names else {}
    card = located.folder / CARD
    return Facts(
        model=config.model,
        source=source.kind,
        revision=located.revision,
        config=checked.config,
        family=family,
        licence=licence_of(card.read_bytes()[:CARD_LIMIT]) if card.is_file() else None,
        template=bool(settings.get("chat_template") or names & TEMPLATES),
        files=tuple(sorted((name, (located.folder / name).stat().st_size) for name in names)),
        weights=_count(tensors, checked.config, family),
    )


def _count(tensors: Mapping[str, Tensor], config: Mapping[str, Any], family: Family) -> Weights | None:
    form = config.get("quantization_config")
    if isinstance(form, dict) and form.get("quant_method") != "textgen":
        return None
    return anatomy.count(tensors, config, family)


def _of_gguf(source: Source, config: ModelConfig, report: Report) -> Facts:
    assert source.path is not None
    return _of_file(source.path, config.model, source.kind, "")


def _of_index(source: Source, config: ModelConfig, report: Report) -> Facts:
    assert source.revision and source.sha256  # parse takes nothing else
    root = cache.root(config.cache_dir)
    file = wheel.bring(
        source.name, source.revision, source.sha256, root, report=report, offline=config.offline
    )
    return _of_file(file, config.model, source.kind, source.sha256)


def _of_file(path: Path, model: str, kind: str, revision: str) -> Facts:
    """A model in a GGUF file of this machine."""
    return _of_header(gguf.check(path), model, kind, revision, ((path.name, path.stat().st_size),))


def _of_header(
    header: gguf.Header, model: str, kind: str, revision: str, files: tuple[tuple[str, int], ...]
) -> Facts:
    config, family = gguf_words.config_of(header), gguf_words.family_of(header)
    return Facts(
        model=model,
        source=kind,
        revision=revision,
        config=config,
        family=family,
        licence=gguf_words.licence_of(header),
        template=bool(header.chat_template),
        files=files,
        weights=anatomy.count(gguf_words.tensors_of(header), config, family),
    )


def _of_catalog(source: Source, config: ModelConfig, report: Report) -> Facts:
    """An entry of the catalogue: from the cache where it is there, else what is pinned of it."""
    entry = CATALOG[source.name]
    root = cache.root(config.cache_dir)
    if cache.whole(packaged.folder_of(root, entry.member_sha256)) is not None:
        return replace(_of_folder(source, config, report), licence=entry.licence)
    return Facts(
        model=config.model,
        source=source.kind,
        revision=entry.member_sha256,
        config=entry.config,
        family="causal",
        licence=entry.licence,
        template=True,
        files=((Path(entry.member).name, entry.member_size),),
        weights=anatomy.count(_llama(entry.config), entry.config, "causal"),
    )


def _llama(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a Llama whose head is its embedding table; where they lie is not known."""
    found = anatomy.sizes(config)
    assert found is not None
    hidden, queries, pairs = found.hidden, found.heads * found.key, found.kv_heads * found.key
    layer = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (pairs, hidden),
        "self_attn.v_proj": (pairs, hidden), "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (found.inner, hidden), "mlp.up_proj": (found.inner, hidden),
        "mlp.down_proj": (hidden, found.inner),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (found.vocabulary, hidden), "norm": (hidden,)}
    shapes |= {f"layers.{at}.{name}": shape for at in range(found.layers) for name, shape in layer.items()}
    return {f"model.{name}.weight": Tensor("F32", shape, 0, 0) for name, shape in shapes.items()}


# ModelScope's client reads no parts of files: what is not here of it comes whole.
LOOKS: dict[Kind, Callable[[Source, ModelConfig, Report], Facts]] = {
    "catalog": _of_catalog,
    "hub": _of_hub,
    "modelscope": _of_folder,
    "index": _of_index,
    "folder": _of_folder,
    "gguf": _of_gguf,
}
