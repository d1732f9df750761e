"""Converts a GGUF file into a folder of float32 safetensors that plain transformers loads.

Owns the one call of transformers' GGUF reader and the tidying of what it writes. Knows no cache and no name
of a model.
"""

import functools
import gc
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers import modeling_gguf_pytorch_utils as library
from transformers.utils import logging as transformers_logging

from textgen_cli.errors import ModelError, OutOfMemory
from textgen_cli.events import Progress, Report
from textgen_cli.model.cache import writing
from textgen_cli.model.gguf import Header, Tensor, check
from textgen_cli.model.rope import scaling_of

# What transformers and gguf raise for a file whose layout holds but whose content they cannot use.
REFUSALS: tuple[type[Exception], ...] = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
REFUSALS += (AssertionError, OSError, RuntimeError, MemoryError)  # torch runs out of memory by RuntimeError

# Read from the file by the tokenizer alone, before; the model's reader would make an object of each element.
TOKENIZER_ONLY = ("tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")

# What each rotary frequency is divided by, where a model's context was stretched as Llama 3's was.
DIVISORS = "rope_freqs.weight"
STRETCHED = ("llama",)  # architectures for which that is known to be all there is to it

# Tokens after which the model has had its say.
ENDS = ("eos", "eot", "eom")


def gguf_to_safetensors(source: Path, folder: Path, *, report: Report) -> None:
    """Write the model and the tokenizer of a GGUF file into `folder`, exactly, as float32.

    Raises ModelError (E-GGUF: the file or its architecture cannot be used, E-WEIGHTS: weights are missing or
    left over), OutputError E-WRITE, OutOfMemory.
    """
    header = check(source)
    _check_scaling(header, source.name)
    report(Progress("convert", source.name))
    with _quiet(source.name, report):
        with writing(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".source") as place:
            # In a folder of its own no file that happens to lie beside it can take part.
            Path(place, "model.gguf").symlink_to(source.resolve())
            with _refusals(source.name):
                model, tokenizer = _read(place, header, source.name)
            _stretch(model.config, source, header)
        with writing(folder), _disk_full(folder):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            _tidy(folder, header)


def _read(place: str, header: Header, subject: str) -> tuple[Any, Any]:
    """The model and the tokenizer of `model.gguf` in the folder `place`."""
    options: dict[str, Any] = {
        "gguf_file": "model.gguf",
        "local_files_only": True,
        "trust_remote_code": False,
    }
    # AutoTokenizer would read the whole file once more, only to come to this class.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(place, **options)
    model_class: Any = transformers.AutoModelForCausalLM
    model, info = model_class.from_pretrained(
        place,
        dtype=torch.float32,
        # Left to itself it may keep weights packed, and ask a hub for code that computes with them.
        quantization_config=transformers.GgufConfig(dequantize=True),
        output_loading_info=True,
        **options,
    )
    _check_weights(model, info, header, subject)
    model.generation_config = _generation_config(header)
    return model, tokenizer


def _check_scaling(header: Header, subject: str) -> None:
    """Refuse positions that are scaled in a way which transformers' reader would leave out in silence."""
    kind = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if kind != "none" and header.architecture != "gpt-oss":
        raise ModelError("E-GGUF", subject, f"scales positions by {kind!r}, which is not converted")


def _divisors(header: Header) -> Tensor | None:
    held = header.architecture in STRETCHED
    return next((tensor for tensor in header.tensors if held and tensor.name == DIVISORS), None)


def _stretch(config: Any, source: Path, header: Header) -> None:
    """Let the config say what the file's divisors do; ModelError E-GGUF where no scaling of transformers does that."""
    tensor = _divisors(header)
    if tensor is None:
        return
    scaling = None
    if tensor.type == "F32":
        divisors = np.fromfile(source, dtype="<f4", count=prod(tensor.shape), offset=tensor.offset)
        scaling = scaling_of(divisors.tolist(), config)
    if scaling is None:
        raise ModelError("E-GGUF", source.name, f"{DIVISORS} is no scaling that transformers knows")
    config.rope_parameters = scaling


def _check_weights(model: Any, info: dict[str, Any], header: Header, subject: str) -> None:
    for problem, keys in info.items():
        if keys:
            first = min(map(str, keys))
            raise ModelError(
                "E-WEIGHTS", subject, f"{len(keys)} {problem.replace('_', ' ')}: {first} (first)"
            )
    # Tensors that it has no place for are dropped by transformers in silence, so the numbers are counted.
    tied = model.config.tie_word_embeddings
    divisors = _divisors(header)
    left_out = {"output.weight"} if tied else set()
    left_out |= {divisors.name} if divisors else set()
    held = sum(prod(tensor.shape) for tensor in header.tensors if tensor.name not in left_out)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if held != wanted:
        raise ModelError("E-WEIGHTS", subject, f"holds {held} weights, {header.architecture} takes {wanted}")


def _generation_config(header: Header) -> Any:
    """Which tokens begin, end and pad a text; nothing about sampling, of which the file says nothing."""
    tokens = {
        name: header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in (*ENDS, "bos", "padding")
    }
    ends = sorted({token for name in ENDS if (token := tokens[name]) is not None})
    config: Any = transformers.GenerationConfig
    return config(
        bos_token_id=tokens["bos"],
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=tokens["padding"],
    )


@contextmanager
def _refusals(subject: str) -> Iterator[None]:
    """Turn what the libraries raise about a file into ModelError E-GGUF, lack of memory into OutOfMemory."""
    try:
        yield
    except REFUSALS as error:
        text = str(error)
        if isinstance(error, MemoryError) or "can't allocate memory" in text:
            raise OutOfMemory("E-MEMORY", subject, "memory is not enough to convert it") from error
        fact = (text.splitlines() or [""])[0] or type(error).__name__
        raise ModelError("E-GGUF", subject, f"transformers cannot read it: {fact}") from error


@contextmanager
def _disk_full(folder: Path) -> Iterator[None]:
    """safetensors hides the number of the operating system's error in its text."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


@contextmanager
def _quiet(subject: str, report: Report) -> Iterator[None]:
    """Nothing on stderr from the libraries, progress to `report`, and none of the work that they repeat."""

    def progress(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        total = len(tensors)  # type: ignore[arg-type]
        for done, tensor in enumerate(tensors):
            report(Progress("convert", subject, done, total, "tensors"))
            yield tensor

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        chatter: Any = transformers_logging
        stack.callback(chatter.set_verbosity, chatter.get_verbosity())
        chatter.set_verbosity(logging.CRITICAL)
        if chatter.is_progress_bar_enabled():
            stack.callback(chatter.enable_progress_bar)
            chatter.disable_progress_bar()
        # transformers opens the file twice and builds the table of names for every module of the model.
        _replace(stack, gguf, "GGUFReader", functools.lru_cache(_Reader))
        _replace(stack, gguf, "get_tensor_name_map", functools.lru_cache(gguf.get_tensor_name_map))
        _replace(stack, library, "tqdm", progress)
        if gc.isenabled():
            # Half a million small objects live until the end; looking for garbage among them finds none.
            stack.callback(gc.enable)
            gc.disable()
        yield


class _Reader(gguf.GGUFReader):
    """gguf's reader on a plain array, whose slices cost a third of those of a memory map."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        for key in TOKENIZER_ONLY:
            self.fields.pop(key, None)

    @property
    def data(self) -> Any:
        return self._array

    @data.setter
    def data(self, mapped: Any) -> None:
        self._array = np.asarray(mapped)


def _replace(stack: ExitStack, module: Any, name: str, value: Any) -> None:
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, value)


def _tidy(folder: Path, header: Header) -> None:
    """Leave in the JSON files what is about the model and drop what is about this conversion."""
    config = _edit(folder / "config.json", drop=("_name_or_path", "_model_name_or_path"))
    context = header.context_length or config.get("max_position_embeddings")
    set_ = {"model_max_length": context} if context else {}
    _edit(folder / "tokenizer_config.json", drop=("is_local", "local_files_only", "name_or_path"), **set_)


def _edit(path: Path, *, drop: Iterable[str], **values: Any) -> dict[str, Any]:
    settings = {**json.loads(path.read_bytes()), **values}
    for key in drop:
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")
    return settings
