"""A conversation as token ids, and which of them are learnt: what the assistant says, with the token that ends it.

Its prompts are those of `generate`: the model's chat template, in which no text can play a control token. It knows no
batches and no trainer.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from textgen_cli.errors import ModelError
from textgen_cli.model.tokenizer import Marks, Tokenizer


def turns(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[list[int], bool]]:
    """A conversation as pieces of ids, with whether a piece is learnt: an answer with the token that ends it.

    A prompt's ids are those that `encode_chat` gives when the model is asked for that answer. Raises ModelError
    E-TEMPLATE for a template that shows what was said otherwise once the conversation goes on.
    """
    if not tokenizer.has_template:
        yield from _plain_turns(tokenizer, messages)
        return
    marks = Marks(tokenizer.specials, messages)
    hidden = marks.hide([dict(message) for message in messages])
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _rendered(tokenizer, hidden[:number], answer=True)
        answered = _rendered(tokenizer, hidden[: number + 1], answer=False)
        if not (asked.startswith(done) and answered.startswith(asked)):
            fact = "its chat template writes earlier messages otherwise once others follow"
            raise ModelError("E-TEMPLATE", tokenizer.name, fact)
        yield _ids(tokenizer, marks, asked[len(done) :]), False
        answer = _ids(tokenizer, marks, answered[len(asked) :])
        cut = _answer_end(tokenizer, answer)
        yield answer[:cut], True
        yield answer[cut:], False
        done = answered


def _plain_turns(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[list[int], bool]]:
    """A prompt and its completion one after the other, for a model without a template."""
    if [message["role"] for message in messages] != ["user", "assistant"]:
        fact = "has no chat template; without one a conversation is one prompt and one completion"
        raise ModelError("E-TEMPLATE", tokenizer.name, fact)
    prompt = tokenizer.encode(messages[0]["content"])
    end = tokenizer.backend.eos_token_id
    if isinstance(end, int) and prompt[-1:] == [end]:
        prompt.pop()
    yield prompt, False
    yield tokenizer.encode_literal(messages[1]["content"]) + ([end] if isinstance(end, int) else []), True


def _rendered(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], *, answer: bool) -> str:
    if answer:
        return tokenizer.render(messages)
    tokenizer._pin_date()
    return str(tokenizer.backend.apply_chat_template(list(messages), tokenize=False))


def _ids(tokenizer: Tokenizer, marks: Marks, text: str) -> list[int]:
    ids: list[int] = []
    for piece, literal in marks.split(text):
        if literal:
            ids += tokenizer.encode_literal(literal)
        elif piece:
            ids += tokenizer.backend(piece, add_special_tokens=False)["input_ids"]
    return ids


def _answer_end(tokenizer: Tokenizer, answer: Sequence[int]) -> int:
    """Where an answer ends: behind the last control token that the template puts after it."""
    specials = set(tokenizer.backend.all_special_ids)
    if tokenizer.fast is not None:
        specials |= {i for i, token in tokenizer.fast.get_added_tokens_decoder().items() if token.special}
    return next((at + 1 for at in range(len(answer) - 1, -1, -1) if answer[at] in specials), len(answer))
