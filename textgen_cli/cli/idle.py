"""Options of generate that are typed and would do nothing in this run: refused, not passed over.

From a variable or a settings file they are defaults for the runs that they fit, and the others leave them alone.
"""

from collections.abc import Iterator

from textgen_cli.config import GenerateConfig, option_name
from textgen_cli.errors import UsageError

SERVER = ("concurrency", "split_sequences", "endpoint_server")
DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
MACHINE = ("device", "threads", "cache_dir", "mirror")  # a classifier beside a server obeys them


def refuse(config: GenerateConfig, typed: frozenset[str]) -> None:
    """UsageError E-CONFLICT for the first of the `typed` settings that is one of them."""
    for name, fact in _idle(config):
        if name in typed:
            raise UsageError("E-CONFLICT", option_name(name), fact)


def _idle(config: GenerateConfig) -> Iterator[tuple[str, str]]:
    """What is set and has no effect, and why."""
    if config.endpoint.endpoint is None:
        yield from ((name, "needs --endpoint") for name in _changed(config.endpoint, SERVER))
    else:
        names = ("dtype",) if config.guarding.safety_model is not None else ("dtype", *MACHINE)
        yield from ((name, "means nothing to a server") for name in _changed(config.model, names))
        if config.batch.rows not in (None, 1):  # one at a time: what has come is written at once
            yield "batch_size", "means nothing to a server; --concurrency bounds the calls"
    if config.decoding.greedy:
        yield from (
            (name, "means nothing to --greedy, which draws nothing")
            for name in _changed(config.decoding, DRAWING)
        )
    if config.decoding.watermark is None:
        yield from ((name, "needs --watermark") for name in _changed(config.decoding, ("watermark_bias",)))


def _changed(part: object, names: tuple[str, ...]) -> list[str]:
    """Which of these fields are not what they are where nothing is said."""
    return [name for name in names if getattr(part, name) != getattr(type(part), name)]
