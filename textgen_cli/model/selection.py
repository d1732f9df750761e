"""Which files of a repository are fetched: what loading needs, or what somebody asked for; never what runs code.

Plain names in, names out. It knows no server and reads no file.
"""

import fnmatch
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from textgen_cli.errors import ModelError, SafetyError
from textgen_cli.model.check import LOADABLE
from textgen_cli.model.snapshot import File, is_inside
from textgen_cli.model.weights import ADAPTER, INDEX, PICKLES, SINGLE, no_weights

# What runs code when it is opened, by a Python or any other program.
PICKLED = (*PICKLES, ".joblib", ".npy", ".npz", ".h5", ".hdf5", ".keras", ".pb", ".mlmodel", ".nemo", ".dill")
PROGRAMS = (".py", ".pyc", ".pyd", ".pyx", ".ipynb", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".cmd", ".ps1",
            ".js", ".jar", ".whl", ".egg", ".deb", ".rpm", ".apk", ".zip", ".tar", ".gz", ".7z", ".lnk")  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What of a repository is asked for besides what loading needs; patterns are those of the shell."""

    include: tuple[str, ...] = ()  # these alone
    exclude: tuple[str, ...] = ()
    all_files: bool = False

    @property
    def is_default(self) -> bool:
        return not (self.include or self.exclude or self.all_files)


def runs_code(name: str) -> bool:
    """Whether a file's name says that it is a program, or a pickle or an archive that may hold one."""
    return name.lower().endswith((*PICKLED, *PROGRAMS)) or name.startswith("custom_generate/")


def loadable(repo: str, files: Sequence[File]) -> list[File]:
    """The files that loading needs, small ones first; a single file of weights wins over its shards.

    Raises ModelError E-WEIGHTS or E-ADAPTER, SafetyError E-PICKLE where there are no weights.
    """
    names = {file.name for file in files}
    if not names & {SINGLE, INDEX, ADAPTER}:
        raise no_weights(repo, names)
    found = [file for file in files if LOADABLE.fullmatch(file.name)]
    if SINGLE in names:
        found = [file for file in found if file.name == SINGLE or not file.name.startswith("model") or
                 not file.name.endswith((".safetensors", ".safetensors.index.json"))]  # fmt: skip
    return _ordered(found)


def choose(repo: str, files: Sequence[File], wanted: Wanted) -> tuple[list[File], list[str]]:
    """The files asked for, and the names of those that were meant too and are never fetched since they run code.

    Raises SafetyError E-PATH for a name that leaves the folder, E-PICKLE or E-REMOTE-CODE where nothing else was
    meant; ModelError E-NO-FILE where nothing is, E-NAMES for two names that are one on some disks.
    """
    if wanted.include or wanted.all_files:
        meant = [file for file in files if _matches(file.name, wanted.include or ("*",))]
    else:
        meant = loadable(repo, files)
    meant = [file for file in meant if not _matches(file.name, wanted.exclude)]
    if not meant:
        raise ModelError("E-NO-FILE", repo, "has no file that is asked for")
    refused = sorted(file.name for file in meant if runs_code(file.name))
    found = [file for file in meant if not runs_code(file.name)]
    if not found:
        pickled = refused[0].lower().endswith(PICKLED)
        fact = (
            "holds weights as a pickle, which can run code"
            if pickled
            else "is code, or an archive that may hold it"
        )
        raise SafetyError("E-PICKLE" if pickled else "E-REMOTE-CODE", refused[0], fact)
    for file in found:
        if not is_inside(file.name):
            raise SafetyError(
                "E-PATH", repo, f"lists {file.name!r}, which is no name of a file inside a folder"
            )
    _check_twins(repo, found)
    return _ordered(found), refused


def _ordered(files: Sequence[File]) -> list[File]:
    return sorted(files, key=lambda file: (file.size, file.name))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """As the shell and the Hub's own tool: `*` matches slashes too, a pattern that ends in one means a folder."""
    return any(
        fnmatch.fnmatchcase(name, pattern + "*" if pattern.endswith("/") else pattern) for pattern in patterns
    )


def _check_twins(repo: str, files: Sequence[File]) -> None:
    seen: dict[str, str] = {}
    for file in files:
        folded = unicodedata.normalize("NFC", file.name).casefold()
        for place in (folded, *(str(parent) for parent in PurePosixPath(folded).parents)):
            if place in seen and (place == folded or seen[place] == "file"):
                raise ModelError(
                    "E-NAMES", repo, f"lists {file.name!r} beside a name that is the same on some disks"
                )
        seen[folded] = "file"
        for parent in PurePosixPath(folded).parents:
            seen.setdefault(str(parent), "folder")
