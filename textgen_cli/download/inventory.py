"""Which models are here: those of the Hub's cache, which all its tools share, ours, and copies made of them.

Sizes are bytes on the disk; the last use is the day the file system knows of. It changes nothing.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from textgen_cli.config import ModelConfig
from textgen_cli.download import place
from textgen_cli.model import cache, client, hub, modelscope, packaged, snapshot
from textgen_cli.model.catalog import CATALOG
from textgen_cli.model.snapshot import Cached
from textgen_cli.model.source import parse

# The folders of our cache, and the kind of source whose models lie in each.
OURS = {"gguf": "gguf", "wheel": "index", "modelscope": "modelscope", "compiled": "compiled"}
FORMS = {"gguf": "converted", "compiled": "compiled"}


@dataclass(frozen=True)
class Kept:
    """A model that is here."""

    model: str  # the name by which it is asked for
    source: str
    revision: str  # commit, or sha256 of what was fetched
    form: str  # "": as it came; converted, compiled, int8, int4, copy
    bytes: int
    used: float  # seconds since 1970; 0: unknown
    ours: bool  # fetched or made by textgen, and compared with its hashes
    folder: Path

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        day = datetime.fromtimestamp(self.used, UTC).date().isoformat() if self.used else None
        return {
            "model": self.model,
            "source": self.source,
            "revision": self.revision or None,
            "form": self.form or None,
            "bytes": self.bytes,
            "last_used": day,
            "ours": self.ours,
            "folder": str(self.folder),
        }


def kept(config: ModelConfig) -> list[Kept]:
    """All models that are here, by name."""
    found = [*_of_hub(), *_of_ours(cache.root(config.cache_dir)), *_of_copies(config.cache_dir)]
    return sorted(found, key=lambda one: (one.model, one.source, one.revision))


def named(config: ModelConfig, name: str) -> list[Kept]:
    """Those that a model's name means: one revision where it names one, else all of them."""
    source = parse(name)
    found = []
    for one in kept(config):
        if source.kind == "hub":
            known = one.source == "hub" and one.model == source.name and one.form == ""
            commits = (source.revision, snapshot.ref(hub.home_of(source.name), source.revision or ""))
            fits = known and (source.revision is None or one.revision in commits)
        elif source.kind == "gguf":
            fits = one.source == "gguf" and one.model == Path(source.name).name
        elif source.kind == "modelscope":
            home = modelscope.home_of(cache.root(config.cache_dir), source.name)
            wanted = (source.revision, snapshot.ref(home, source.revision or ""))
            fits = one.folder.parent == home and (source.revision is None or one.revision in wanted)
        elif source.kind == "index":
            fits = one.model == f"{source.name}=={source.revision}"
        else:
            fits = one.model == source.name and one.source == source.kind
        if fits or (one.source == "compiled" and one.model == name):
            found.append(one)
    return found


def _of_hub() -> Iterator[Kept]:
    for repo in client.scanned().repos:
        for revision in repo.revisions if repo.repo_type == "model" else ():
            known = Cached(repo.repo_path, revision.commit_hash)
            ours = known.record.exists() or Cached(known.home, known.commit, others=True).record.exists()
            used = max((file.blob_last_accessed for file in revision.files), default=0.0)
            yield Kept(repo.repo_id, "hub", known.commit, "", revision.size_on_disk, used, ours, known.folder)


def _of_ours(root: Path) -> Iterator[Kept]:
    entries = {packaged.folder_of(root, entry.member_sha256): entry for entry in CATALOG.values()}
    for place_, source in OURS.items():
        for folder in sorted([*(root / place_).glob("*"), *(root / place_).glob("*/*")]):
            manifest = cache.whole(folder) if folder.is_dir() and not folder.name.startswith(".") else None
            if manifest is None:
                continue
            name = str(manifest["origin"].get("name", folder.name))
            kind = "catalog" if folder in entries else source
            revision = re.sub(r"-\d+$", "", folder.name)
            form = FORMS.get(source, "")
            size, used = measured(folder)
            yield Kept(name, kind, revision, form, size, used, True, folder)


def _of_copies(root: Path | None) -> Iterator[Kept]:
    for _, origin in place.noted(root):
        folder = Path(origin["folder"])
        if folder.is_dir():
            size, used = measured(folder)
            yield Kept(
                origin["model"], "folder", origin["revision"], origin["form"], size, used, True, folder
            )


def measured(folder: Path) -> tuple[int, float]:
    """Bytes of all files below a folder, and when one of them was last read as far as the file system tells."""
    size, used = 0, 0.0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(where, name))  # noqa: PTH118 - thousands of them
                size, used = size + status.st_size, max(used, status.st_atime)
    return size, used
