"""load() for a process that only runs models: transformers without torch's compiler, which costs a second.

transformers' modelling code imports `torch._dynamo`, and with it sympy and torch.distributed.tensor, to mark a
few functions for `torch.compile`. Nothing is compiled here while text is made or scored (a compiled model is
a library of its own, compiled.py), so the marks are made by a stand-in that leaves functions as they are.
"""

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textgen_cli.config import ModelConfig
    from textgen_cli.events import Report
    from textgen_cli.model.device import Purpose
    from textgen_cli.model.loaded import Model

# Set by the program's entry: the process is one command's and ends with it. Elsewhere the library stays whole.
allowed = False

_COMPILER = "torch._dynamo"
_TRACED = f"{_COMPILER}._trace_wrapped_higher_order_op"

# Shapes made of symbols: torch asks whether it has any wherever it computes with tensors that are shapes alone.
_SYMBOLS = "sympy"
_SYMBOLIC = "torch.fx.experimental.symbolic_shapes"
_TRUTH = ("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious", "statically_known_true")

# What else the modelling code imports where it is there: sharding over processes, and the loss of object detection.
_UNUSED = frozenset({"is_torch_distributed_available", "is_scipy_available"})

# Modules that every network's code imports in turn.
_MODELLING = ("transformers.modeling_utils", "transformers.generation.utils", "transformers.masking_utils")


def load(config: "ModelConfig", purpose: "Purpose", report: "Report") -> "Model":
    """What `load.load` gives and raises."""
    if not allowed or config.adapter:  # peft asks for modules that transformers alone would not
        return _load(config, purpose, report)
    with without_compiler():
        return _load(config, purpose, report)


def _load(config: "ModelConfig", purpose: "Purpose", report: "Report") -> "Model":
    from textgen_cli.model import load as whole

    return whole.load(config, purpose, report)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Import and load within it; once the real compiler is there it stays, and this does nothing."""
    if _COMPILER in sys.modules:
        yield
        return
    with _stand_ins():
        _answer_no()
        for name in _MODELLING:
            importlib.import_module(name)
        with _compiling_when_used():
            yield


@contextmanager
def _stand_ins() -> Iterator[None]:
    """For the compiler's modules and the symbols', taken away again: whoever imports them later gets the real ones."""
    import torch

    compiler, traced = _Unused(_COMPILER), _Unused(_TRACED)
    compiler.__path__ = [f"{torch.__path__[0]}/_dynamo"]  # its other modules are themselves
    vars(compiler).update(dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable"), _mark))
    vars(compiler)["eval_frame"] = SimpleNamespace(
        OptimizedModule=type("OptimizedModule", (), {})
    )  # nothing is one
    vars(traced)["TransformGetItemToIndex"] = _real_transform
    symbols, symbolic = _Unused(_SYMBOLS), _Unused(_SYMBOLIC)
    vars(symbols)["Basic"] = type("Basic", (), {})  # the class of symbols: nothing is one
    vars(symbolic).update(dict.fromkeys(_TRUTH, bool), **_OF_NUMBERS)
    modules = {_COMPILER: compiler, _TRACED: traced, _SYMBOLS: symbols, _SYMBOLIC: symbolic}
    ours = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(ours)
    vars(torch)["_dynamo"] = compiler
    try:
        yield
    finally:
        _take_away(ours)
        if vars(torch).get("_dynamo") is compiler:
            del vars(torch)["_dynamo"]


def _take_away(modules: Mapping[str, ModuleType]) -> None:
    for name, module in modules.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]


class _Unused(ModuleType):
    """A module that becomes the real one when more is asked of it than it has."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _take_away({key: module for key, module in sys.modules.items() if isinstance(module, _Unused)})
        return getattr(importlib.import_module(self.__name__), name)


def _no(*_: Any) -> bool:
    return False


# What is true of sizes that are plain numbers.
_OF_NUMBERS: dict[str, Callable[..., Any]] = {
    "is_nested_int": _no,
    "has_guarding_hint": lambda _: True,
    "guarding_hint_or_throw": int,
    "sym_eq": lambda one, other: one == other if isinstance(one, int) else (*one,) == (*other,),
    "sym_and": lambda *values: all(values),
    "sym_or": lambda *values: any(values),
}


def _mark(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments, that changes nothing."""
    return _mark if function is None else function


def _real_transform() -> Any:
    """The compiler's own context manager, which a mask that is made under vmap enters."""
    return importlib.import_module(_TRACED).TransformGetItemToIndex()


def _answer_no() -> None:
    """To the end of the process, transformers is told that parts of it that nothing here uses are not there."""
    from transformers import utils

    for place in (vars(utils), vars(utils.import_utils)):
        place.update(dict.fromkeys(_UNUSED & place.keys(), _no))


@contextmanager
def _compiling_when_used() -> Iterator[None]:
    """The library builds a table of how weights are renamed for every kind of model: a thousand patterns, few used."""
    from transformers import core_model_loading as library

    later = ModuleType("re")
    vars(later).update({name: getattr(re, name) for name in re.__all__} | {"compile": _Later})
    vars(library)["re"] = later
    try:
        yield
    finally:
        vars(library)["re"] = re


class _Later:
    """A pattern that is compiled when anything is asked of it."""

    def __init__(self, *pattern: Any) -> None:
        self._pattern = pattern

    def __getattr__(self, name: str) -> Any:
        return getattr(re.compile(*self._pattern), name)
