"""Small real models, built from configs with fixed random weights and a tokenizer trained on the spot."""

from collections.abc import Callable
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


ARCHITECTURES: dict[str, tuple[Callable[[int], Any], Callable[[], PreTrainedTokenizerFast]]] = {
    "gpt2": (_gpt2, byte_tokenizer),
    "llama": (_llama, byte_tokenizer),
    "tiny": (_tiny, byte_tokenizer),
    "t5": (_t5, _ending_tokenizer),
    "bert": (_bert, word_tokenizer),
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
