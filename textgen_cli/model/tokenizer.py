"""Text to token ids and back: plain prompts, chat templates, and text that appears token by token.

Text of users in a chat can never become control tokens. Knows no model and no generation.
"""

import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2

from textgen_cli.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_SECONDS = 2.0  # a template is foreign code; longer than this it is refused
_CUT = "\N{REPLACEMENT CHARACTER}"  # what a part of a character is spelled as
_FIRST_PRIVATE = 0xF0000  # Supplementary Private Use Area-A: marks where a control token's text stood

Message = dict[str, Any]


class Tokenizer:
    """A model's tokenizer with its chat template; `date` is what templates see as today."""

    def __init__(self, backend: "PreTrainedTokenizerBase", name: str, date: datetime | None = None) -> None:
        self.backend = backend
        self.name = name
        self.date = date or datetime.now()  # noqa: DTZ005 - templates mean local time
        self.specials = [str(token) for token in backend.all_special_tokens]
        fast: Any = getattr(backend, "backend_tokenizer", None)  # None: a tokenizer in Python
        self.fast = fast
        if fast is not None:
            added = fast.get_added_tokens_decoder().values()
            self.specials = sorted(
                {t.content for t in added if t.special} | set(self.specials), key=len, reverse=True
            )

    @property
    def size(self) -> int:
        """One more than the largest token id."""
        return len(self.backend)

    @property
    def has_template(self) -> bool:
        return bool(self.backend.chat_template)

    def encode(self, text: str, *, language: str | None = None) -> list[int]:
        """The ids of a plain prompt, with the special tokens this model's inputs have.

        `language`: the code that a multilingual encoder is told the text is in.
        """
        if language is not None:
            if not hasattr(self.backend, "src_lang"):
                raise ModelError("E-LANGUAGE", self.name, "its tokenizer takes no language codes")
            self.backend.src_lang = language
        return list(self.backend(text, truncation=False)["input_ids"])

    def encode_literal(self, text: str) -> list[int]:
        """The ids of text in which no control token is recognised and none is added."""
        return list(self.backend(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """The ids of a conversation, ready for the assistant's answer; text of messages stays text."""
        mark = Marks(self.specials, messages)
        rendered = self.render(mark.hide(list(messages)), **variables)
        ids: list[int] = []
        for piece, hidden in mark.split(rendered):
            if hidden:
                ids += self.encode_literal(hidden)
            elif piece:
                ids += self.backend(piece, add_special_tokens=False)["input_ids"]
        return ids

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The conversation as one text; ModelError E-TEMPLATE when the template fails or takes too long."""
        if not self.has_template:
            raise ModelError(
                "E-TEMPLATE",
                self.name,
                "has no chat template",
                hint="drop --chat to continue the text as it is",
            )
        try:
            with _limited(TEMPLATE_SECONDS):
                self._pin_date()
                text = self.backend.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True, **variables
                )
        except jinja2.TemplateError as error:
            raise ModelError("E-TEMPLATE", self.name, f"chat template: {error}") from error
        except (TypeError, ValueError, KeyError, RecursionError, MemoryError, OverflowError) as error:
            raise ModelError(
                "E-TEMPLATE", self.name, f"chat template: {type(error).__name__}: {error}"
            ) from error
        return str(text)

    def _pin_date(self) -> None:
        """Let the template see our date: as a variable the library would turn the function into a string."""
        from transformers.utils import chat_template_utils  # what a plain prompt does without

        template = self.backend.get_chat_template()
        compiled: Any = chat_template_utils._compile_jinja_template(template)
        compiled.globals["strftime_now"] = self.date.strftime

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self.backend.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def decode_fast(self, ids: Sequence[int]) -> str:
        """What `decode` gives, without the library's wrapping, for every step of a batch."""
        return str(self.fast.decode(ids, skip_special_tokens=True))

    def spell(self, token: int) -> str:
        """One token as text, special tokens too; U+FFFD where it is part of a character."""
        return str(self.backend.decode([token], clean_up_tokenization_spaces=False))

    def stream(self, prompt: Sequence[int] = ()) -> "TextStream":
        """A fresh decoder for the tokens that follow `prompt`."""
        return TextStream(self, prompt)


class TextStream:
    """Token ids in, text out as soon as whole characters stand; what was given out is never taken back."""

    # Enough of the prompt to know whether a first word starts with a space.
    CONTEXT = 8
    LONGEST = 4  # tokens of one character at most

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._spell = tokenizer.decode if tokenizer.fast is None else tokenizer.decode_fast
        self._ids = self._whole(list(prompt)[-self.CONTEXT :])
        # Where the prompt was cut amid a character, the rest of it is text to come.
        cuts = range(len(self._ids), max(0, len(self._ids) - self.LONGEST), -1)
        known = next((cut for cut in cuts if not self._is_broken(self._ids[:cut])), len(self._ids))
        self._known, self._before = known, self._spell(self._ids[:known])  # what text of it was given out

    def _whole(self, ids: list[int]) -> list[int]:
        """The ids without a character's end at their beginning, which spoils whatever bytes follow it."""
        starts = range(min(self.LONGEST, len(ids)))
        return next((ids[start:] for start in starts if not self._spell(ids[start:]).startswith(_CUT)), ids)

    def _is_broken(self, ids: list[int]) -> bool:
        return self._spell(ids).endswith(_CUT)

    def feed(self, token: int) -> str:
        """The text this token completes; "" while a character is incomplete."""
        self._ids.append(token)
        whole = self._spell(self._ids)
        if whole.endswith(_CUT):
            return ""
        text = whole[len(self._before) :]
        if (
            text
        ):  # the next text is told from this one alone, so that a step costs the same however long it gets
            self._ids = self._ids[self._known :]
            self._known, self._before = len(self._ids), self._spell(self._ids)
        return text

    def end(self) -> str:
        """What is left: an incomplete character becomes U+FFFD, as the tokenizer's own decode has it."""
        return self._spell(self._ids)[len(self._before) :]


class Marks:
    """Stands private-use characters in for control tokens' texts inside messages, and finds them again."""

    def __init__(self, specials: Sequence[str], messages: Sequence[Mapping[str, Any]]) -> None:
        used = set(repr(messages))
        free = (chr(c) for c in range(_FIRST_PRIVATE, _FIRST_PRIVATE + 0xFFFE) if chr(c) not in used)
        self._mark_of = dict(zip(specials, free, strict=False))
        self._text_of = {mark: text for text, mark in self._mark_of.items()}
        self._find = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        self._marks = re.compile("([" + "".join(self._text_of) + "])" if self._text_of else r"((?!))")

    def hide(self, value: Any) -> Any:
        """The same messages with every control token's text replaced, at any depth."""
        if isinstance(value, str):
            return self._find.sub(lambda match: self._mark_of[match[0]], value)
        if isinstance(value, dict):
            return {key: self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def split(self, text: str) -> Iterator[tuple[str, str]]:
        """(plain text, "") and ("", hidden text) in order."""
        for part in self._marks.split(text):
            yield ("", self._text_of[part]) if part in self._text_of else (part, "")


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Interrupt a template that loops for long; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise jinja2.TemplateRuntimeError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
