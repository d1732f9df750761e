"""A tokenizer read by `tokenizers` alone, with the part of transformers' interface that generating needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers


class PlainTokenizer:
    """Answers as transformers' PreTrainedTokenizerFast does; `facts` is what `facts_of` told of one."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.backend_tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        self.chat_template: str | None = facts["chat_template"]
        self.special_tokens_map: dict[str, str] = facts["special_tokens_map"]
        self.all_special_ids: list[int] = facts["all_special_ids"]
        self.all_special_tokens: list[str] = facts["all_special_tokens"]
        self.bos_token_id: int | None = facts["bos_token_id"]
        self.eos_token_id: int | None = facts["eos_token_id"]
        self.unk_token_id: int | None = facts["unk_token_id"]

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size())

    def __call__(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        truncation: bool = False,
    ) -> dict[str, list[int]]:
        self.backend_tokenizer.encode_special_tokens = split_special_tokens
        encoded = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": encoded.ids}

    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        return str(self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def get_vocab(self) -> dict[str, int]:
        return dict(self.backend_tokenizer.get_vocab())

    def convert_tokens_to_ids(self, token: str) -> int | None:
        found = self.backend_tokenizer.token_to_id(token)
        return self.unk_token_id if found is None else int(found)

    def get_chat_template(self) -> str:
        return self.chat_template or ""

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        **variables: Any,
    ) -> str:
        from transformers.utils import chat_template_utils  # what a plain prompt does without

        rendered: Any = chat_template_utils.render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens_map, **variables},
        )
        return str(rendered[0][0])


def facts_of(backend: Any) -> dict[str, Any]:
    """What of transformers' own tokenizer does not stand in tokenizer.json."""
    template = backend.chat_template
    named = ("bos_token_id", "eos_token_id", "unk_token_id")
    specials = {
        name: str(token) for name, token in backend.special_tokens_map.items() if not isinstance(token, list)
    }
    return {
        "chat_template": template if isinstance(template, str) else None,
        "special_tokens_map": specials,
        "all_special_ids": list(backend.all_special_ids),
        "all_special_tokens": [str(token) for token in backend.all_special_tokens],
        **{name: getattr(backend, name, None) for name in named},
    }
