"""The models that trainings begin with, and the command that trains: what the benchmarks of finetune share."""

import sys
from pathlib import Path

from benchmarks.archives import model_folder
from benchmarks.runner import Side

TEXTGEN = (sys.executable, "-m", "textgen_cli")
HALF = "--dtype bfloat16"  # the weights of an adapter's base, else the products alone


class Parts:
    """What rows share: the folders of models."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.known: dict[str, Path] = {}

    def model(self, name: str) -> Path:
        """The folder of a base: a model of archives.py, or "default"."""
        if name not in self.known:
            if name == "default":
                said = Side("download", [*TEXTGEN, "download"])().output
                self.known[name] = Path(said.strip().splitlines()[-1])
            else:
                self.known[name] = model_folder(name, self.scratch / "models" / name)
        return self.known[name]

    def base(self, name: str) -> list[str]:
        """The options that name a base; "tiny" is a preset to begin from scratch."""
        if name == "tiny":
            return ["--from-scratch", name]
        return [] if name == "default" else ["-m", str(self.model(name))]
