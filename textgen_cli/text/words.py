"""Word lists: a file with one word or phrase a line. Plain Python."""

from pathlib import Path

from textgen_cli.errors import UsageError


def read_words(path: Path) -> list[str]:
    """The words of a list; lines that are empty or begin with # are none. UsageError E-FILE."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError("E-FILE", str(path), (error.strerror or str(error)).lower()) from error
    except UnicodeDecodeError as error:
        raise UsageError("E-FILE", str(path), f"is not UTF-8 at byte {error.start}") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
