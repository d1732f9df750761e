"""Small real models, built from configs with fixed random weights and a tokenizer trained on the spot."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Once upon a time there was a small model that read a few lines and wrote some more.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Numbers such as 1, 2, 3 and 42 stand beside words; so do café, naïve, 你好 and 🙂.",
    "A language model assigns probability to text, one token after another, until the end.",
]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text can be encoded, every id decoded."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|end|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=specials[2:],
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer as BERT has it."""
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces.train_from_iterator(
        TEXT * 4, trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    )
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece's way: blanks are part of pieces."""
    letters = [*"abcdefghijklmnopqrstuvwxyz.,", "\u2581"]
    words = [
        "\u2581a",
        "\u2581the",
        "the",
        "he",
        "in",
        "er",
        "an",
        "re",
        "on",
        "\u2581s",
        "at",
        "en",
        "ou",
        "it",
    ]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(letter, -6.0) for letter in letters] + [(word, -4.0) for word in words]
    model = Tokenizer(models.Unigram(pieces, unk_id=0))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _ending_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", 0)]
    )
    return tokenizer


def _gpt2(size: int) -> Any:
    config = transformers.GPT2Config(
        vocab_size=size, n_positions=128, n_embd=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def _llama(size: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def _tiny(size: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def _t5(size: int) -> Any:
    config: Any = transformers.T5Config(
        vocab_size=size,
        d_model=48,
        d_kv=12,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        eos_token_id=0,
        pad_token_id=0,
    )
    config.decoder_start_token_id = 1
    return transformers.T5ForConditionalGeneration(config)


def _bert(size: int) -> Any:
    config = transformers.BertConfig(
        vocab_size=size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    return transformers.BertForMaskedLM(config)


MOODS = {0: "sad", 1: "glad", 2: "neither"}
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def _frame(size: int, labels: dict[int, str], **more: Any) -> Any:
    """A BERT config for a head of labels."""
    return transformers.BertConfig(
        vocab_size=size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
        **more,
    )


def _classifier(labels: dict[int, str], problem: str | None) -> Callable[[int], Any]:
    return lambda size: transformers.BertForSequenceClassification(
        _frame(size, labels, problem_type=problem, initializer_range=0.1)
    )


def _tagger(tags: Sequence[str]) -> Callable[[int], Any]:
    return lambda size: transformers.BertForTokenClassification(_frame(size, dict(enumerate(tags))))


def _gpt2_classifier(size: int) -> Any:
    """A causal network with a head of labels and no token for padding."""
    config = transformers.GPT2Config(
        vocab_size=size, n_positions=128, n_embd=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=0,
        id2label=MOODS, pad_token_id=None,
    )  # fmt: skip
    return transformers.GPT2ForSequenceClassification(config)


def _bart_classifier(size: int) -> Any:
    config = transformers.BartConfig(
        vocab_size=size, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=128,
        init_std=0.1, bos_token_id=1, eos_token_id=0, pad_token_id=2, decoder_start_token_id=0, id2label=MOODS,
    )  # fmt: skip
    return transformers.BartForSequenceClassification(config)


def _padding_tokenizer() -> PreTrainedTokenizerFast:
    """One whose texts end in a token that is not that of padding."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", pair="$A <|end|> $B <|end|>", special_tokens=[("<|end|>", 0)]
    )
    tokenizer.pad_token = "<|system|>"
    return tokenizer


def _framing_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with tokens around a text and offsets without blanks, as RoBERTa has it."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(
        ("<|end|>", 0), ("<|begin|>", 1), trim_offsets=True, add_prefix_space=False
    )
    return tokenizer


ARCHITECTURES: dict[str, tuple[Callable[[int], Any], Callable[[], PreTrainedTokenizerFast]]] = {
    "gpt2": (_gpt2, byte_tokenizer),
    "llama": (_llama, byte_tokenizer),
    "tiny": (_tiny, byte_tokenizer),
    "gpt2-word-pieces": (_gpt2, word_tokenizer),
    "llama-pieces": (_llama, piece_tokenizer),
    "t5": (_t5, _ending_tokenizer),
    "bert": (_bert, word_tokenizer),
    "bert-classifier": (_classifier(MOODS, None), word_tokenizer),
    "bert-multilabel": (_classifier(MOODS, "multi_label_classification"), word_tokenizer),
    "bert-regression": (_classifier({0: "grade"}, "regression"), word_tokenizer),
    "bert-regressions": (_classifier({0: "form", 1: "content"}, "regression"), word_tokenizer),
    "bert-grade": (_classifier({0: "grade"}, None), word_tokenizer),
    "gpt2-classifier": (_gpt2_classifier, byte_tokenizer),
    "bart-classifier": (_bart_classifier, _padding_tokenizer),
    "bert-tagger": (_tagger(TAGS), word_tokenizer),
    "bert-byte-tagger": (_tagger(TAGS), _framing_tokenizer),
    "bert-bioes-tagger": (
        _tagger(["O", *(f"{prefix}-PER" for prefix in "BIES")]),
        word_tokenizer,
    ),
    "bert-io-tagger": (_tagger(["O", "PER", "LOC"]), word_tokenizer),
}


def build(architecture: str, folder: Path, *, template: str | None = None, spread: float = 4.0) -> Path:
    """Save a small model of an architecture; `spread` widens the weights so that its logits are not all alike."""
    make_net, make_tokenizer = ARCHITECTURES[architecture]
    tokenizer = make_tokenizer()
    torch.manual_seed(7)
    net = make_net(len(tokenizer))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    if template is not None:
        tokenizer.chat_template = template
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # What the library derives from the config here would pass for settings of the model.
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder
