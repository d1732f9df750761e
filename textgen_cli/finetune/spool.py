"""Examples on disk: an Arrow stream that is written as they come and read back a batch at a time.

Owns the working folder and its end. Knows no task.
"""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import pyarrow as pa

from textgen_cli.model import cache
from textgen_cli.text.disk import guard

BATCH_ROWS = 1000
BATCH_SIZE = 8 << 20  # characters, about


class Writer:
    """Writes examples to a file. Use it as a context manager; OutputError E-WRITE where the disk fails."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema, self.count = path, schema, 0
        self._held: list[dict[str, Any]] = []
        self._size = 0
        with guard(path):
            self._file = pa.OSFile(str(path), "wb")
            self._stream = pa.ipc.new_stream(self._file, schema)

    def add(self, example: dict[str, Any], size: int) -> None:
        """Take an example of about `size` characters."""
        self._held.append(example)
        self._size += size
        self.count += 1
        if len(self._held) >= BATCH_ROWS or self._size >= BATCH_SIZE:
            self._flush()

    def _flush(self) -> None:
        with guard(self.path):
            if self._held:
                self._stream.write_batch(pa.RecordBatch.from_pylist(self._held, schema=self.schema))
        self._held, self._size = [], 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                with guard(self.path):
                    self._stream.close()
        finally:
            with suppress(OSError):
                self._file.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The examples of a file, in order."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            yield from batch.to_pylist()


@contextmanager
def working_folder(cache_dir: Path | None) -> Iterator[Path]:
    """An empty folder below the cache for as long as the block; those of killed runs are removed.

    It lies on disk and not in memory, as a folder for temporary files may. Raises OutputError where it cannot be made.
    """
    home = cache.root(cache_dir) / "finetune"
    folder = home / secrets.token_hex(8)
    lock = filelock.FileLock(folder.with_suffix(".lock"))
    with guard(home):
        home.mkdir(mode=0o755, parents=True, exist_ok=True)
        with filelock.FileLock(home / "all"):  # else another process could sweep away what is not locked yet
            _sweep(home)
            lock.acquire(timeout=0)
            folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        _remove(folder, lock)


def _sweep(home: Path) -> None:
    """Remove the folders whose owner is gone: the kernel gave their locks back."""
    for path in home.glob("*.lock"):
        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            continue
        _remove(path.with_suffix(""), lock)


def _remove(folder: Path, lock: filelock.BaseFileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        Path(lock.lock_file).unlink()
    lock.release()
