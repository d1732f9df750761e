"""`--quantize` and `--convert`: a lasting copy of a model in a folder of the user's. Brings torch in."""

from dataclasses import replace
from typing import Any

from textgen_cli.config import DownloadConfig
from textgen_cli.download import inventory, place
from textgen_cli.download.run import run
from textgen_cli.events import Report
from textgen_cli.model import cache, copies
from textgen_cli.model.source import locate, parse


def make(config: DownloadConfig, report: Report) -> dict[str, Any]:
    """Make the copy in the folder `to`, whole or not at all; returns what there is to tell of it.

    Raises what `load` raises; OutputError (E-EXISTS, E-SPACE, E-WRITE).
    """
    model = config.model
    assert config.getting.to is not None  # the config takes nothing else
    located = locate(model, report)
    if model.quantize is None and model.dtype == "auto":
        model = replace(model, dtype=copies.stored_dtype(located.folder), device="cpu")
        if not model.adapter:  # safetensors already, in the dtype wanted
            return {**run(config, report).fields(), "form": "converted"}
    form = model.quantize or str(model.dtype)
    target = config.getting.to.expanduser().absolute()
    cache.check_space(target.parent, inventory.measured(located.folder.resolve())[0], str(config.getting.to))
    with cache.replaced(target) as staging:
        copies.write(model, staging, report)
    origin = {"model": model.model, "revision": located.revision, "form": form}
    place.note(model.cache_dir, target, origin)
    size, _ = inventory.measured(target)
    return {"model": model.model, "source": parse(model.model).kind, "revision": located.revision or None,
            "form": form, "bytes": size, "folder": str(target)}  # fmt: skip
