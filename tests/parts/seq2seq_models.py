"""Small encoder-decoders in folders as published ones have them: BART, Marian, M2M100 and NLLB."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from parts.models import TEXT, byte_tokenizer

SMALL: dict[str, Any] = {
    "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 128,
}  # fmt: skip


def save(net: Any, tokenizer: Any, folder: Path, **generation: Any) -> Path:
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    net.generation_config = transformers.GenerationConfig(**generation)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentences(folder: Path, name: str, size: int = 120) -> str:
    """A small sentencepiece model, trained on the spot."""
    import sentencepiece

    (folder / "text.txt").write_text("\n".join(TEXT * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / name), vocab_size=size, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "text.txt").unlink()
    (folder / f"{name}.model").rename(folder / f"{name}.spm")
    (folder / f"{name}.vocab").unlink()
    return str(folder / f"{name}.spm")


def pieces(spm: str, first: list[str]) -> dict[str, int]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=spm)
    words = [model.id_to_piece(number) for number in range(model.get_piece_size())]
    return {word: number for number, word in enumerate([*first, *(w for w in words if w not in first)])}


def _quieten(net: Any, first: int) -> None:
    """Language codes, which begin at `first`, shall not be most of what a random network writes."""
    with torch.no_grad():
        net.get_input_embeddings().weight[first:].mul_(0.2)


def bart(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    config = transformers.BartConfig(
        vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=0, pad_token_id=0, decoder_start_token_id=0,
        forced_eos_token_id=None, **SMALL,
    )  # fmt: skip
    torch.manual_seed(5)
    net = transformers.BartForConditionalGeneration(config)
    return save(net, tokenizer, folder, decoder_start_token_id=0, eos_token_id=0, pad_token_id=0)


def marian(folder: Path, target: str = "fr", *tags: str) -> Path:
    """One that translates from English into `target`, or into what a token says that stands before the text."""
    spm = sentences(folder, "source")
    shutil.copy(spm, folder / "target.spm")
    vocab = pieces(spm, ["</s>", "<unk>", *tags])
    vocab["<pad>"] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = transformers.MarianTokenizer(
        str(folder / "source.spm"), str(folder / "target.spm"), str(folder / "vocab.json"),
        source_lang="en", target_lang=target,
    )  # fmt: skip
    pad = vocab["<pad>"]
    config = transformers.MarianConfig(
        vocab_size=len(vocab), pad_token_id=pad, eos_token_id=0, decoder_start_token_id=pad,
        forced_eos_token_id=None, **SMALL,
    )  # fmt: skip
    torch.manual_seed(5)
    net = transformers.MarianMTModel(config)
    return save(
        net,
        tokenizer,
        folder,
        decoder_start_token_id=pad,
        eos_token_id=0,
        pad_token_id=pad,
        bad_words_ids=[[pad]],
    )


def m2m(folder: Path) -> Path:
    sentences(folder, "sentencepiece")
    (folder / "sentencepiece.spm").rename(folder / "sentencepiece.bpe.model")
    vocab = pieces(str(folder / "sentencepiece.bpe.model"), ["<s>", "<pad>", "</s>", "<unk>"])
    (folder / "vocab.json").write_text(json.dumps(vocab))
    files = str(folder / "vocab.json"), str(folder / "sentencepiece.bpe.model")
    tokens = list(transformers.M2M100Tokenizer(*files).lang_token_to_id)
    # Published ones name their codes as special tokens; the class alone does not.
    tokenizer = transformers.M2M100Tokenizer(*files, additional_special_tokens=tokens)
    config = transformers.M2M100Config(
        vocab_size=len(tokenizer) + 8, pad_token_id=1, eos_token_id=2, bos_token_id=0, decoder_start_token_id=2,
        **SMALL,
    )  # fmt: skip
    torch.manual_seed(5)
    net = transformers.M2M100ForConditionalGeneration(config)
    _quieten(net, len(vocab))
    return save(net, tokenizer, folder, decoder_start_token_id=2, eos_token_id=2, pad_token_id=1)


def nllb(folder: Path) -> Path:
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator(
        TEXT * 4, trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]
    tokenizer = transformers.NllbTokenizer(vocab=model["vocab"], merges=merges, src_lang="eng_Latn")
    config = transformers.M2M100Config(
        vocab_size=len(tokenizer),
        pad_token_id=1,
        eos_token_id=2,
        bos_token_id=0,
        decoder_start_token_id=2,
        **SMALL,
    )
    torch.manual_seed(5)
    net = transformers.M2M100ForConditionalGeneration(config)
    _quieten(net, len(model["vocab"]))
    return save(net, tokenizer, folder, decoder_start_token_id=2, eos_token_id=2, pad_token_id=1)


def _marian_of_several(folder: Path) -> Path:
    return marian(folder, "ROMANCE", ">>fra<<", ">>es<<")


MAKERS: dict[str, Callable[[Path], Path]] = {
    "bart": bart, "marian": marian, "marian of several": _marian_of_several, "m2m": m2m, "nllb": nllb,
}  # fmt: skip
