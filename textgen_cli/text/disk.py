"""Calls of the operating system that a job's files need, with their failures as our errors.

Owns the lock, the checks of files that somebody else may have put there, and the wording of disk failures.
Knows nothing of what the files hold.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from textgen_cli.errors import BusyError, OutputError

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def reason(error: OSError) -> str:
    """The system's own words for a failure, as the end of a sentence."""
    text = os.strerror(error.errno or 0)
    return text[:1].lower() + text[1:]


@contextmanager
def guard(path: Path, done: int = 0) -> Iterator[None]:
    """Turn an OSError into OutputError E-WRITE (or E-NAME-TOO-LONG) that counts the `done` records."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            fact = "the name is too long with .partial added"
            raise OutputError("E-NAME-TOO-LONG", str(path), fact) from error
        fact, hint = reason(error), None
        if done:
            fact += f" (after {done} records)"
            hint = "mend that, then run it again with --resume"
        raise OutputError("E-WRITE", str(path), fact, hint=hint) from error


def write_all(fd: int, data: bytes) -> None:
    """Write all of the bytes, however few the system takes at once."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def refuse_other(path: Path) -> None:
    """OutputError E-WRITE where a file may not take this name: a folder has it, a link, a pipe or a device.

    Renaming would put the file in their place, and as root in that of /dev/null.
    """
    with guard(path), suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            fact = "is a directory" if stat.S_ISDIR(mode) else "is not a regular file"
            raise OutputError("E-WRITE", str(path), fact)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file that is there whole or not at all. OutputError E-WRITE where that fails."""
    refuse_other(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with guard(path):
        try:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def open_old(path: Path) -> int:
    """Open a regular file of our own for reading and appending; no link is followed."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW)
    return _checked(fd, path)


def open_new(path: Path, mode: int) -> int:
    """Create a file for reading and appending; FileExistsError where anything has that name."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL, mode)
    try:
        return _checked(fd, path)
    except OutputError:
        path.unlink()
        raise


def _checked(fd: int, path: Path) -> int:
    info = os.fstat(fd)
    fact = None
    if not stat.S_ISREG(info.st_mode):
        fact = "is not a regular file"
    elif info.st_uid != os.geteuid():
        fact = f"belongs to another user (uid {info.st_uid})"
    elif info.st_mode & 0o600 != 0o600:
        fact = "may not be read and written by its owner: mind the umask"
    if fact is None:
        return fd
    close(fd)
    raise OutputError("E-WRITE", str(path), fact)


def open_locked(path: Path, mode: int, *, lock: bool) -> int:
    """Open a file, new or old, and hold the kernel's lock on it, which ends with this process at the latest.

    Raises BlockingIOError where another process holds it, BusyError E-NO-LOCKS where there are no locks.
    """
    while True:
        fd = _open_either(path, mode)
        try:
            if lock:
                _flock(fd, path)
            # A holder that ended meanwhile has removed the file that this lock is on.
            if same(fd, path):
                return fd
        except BaseException:
            close(fd)
            raise
        close(fd)


def _open_either(path: Path, mode: int) -> int:
    while True:
        with suppress(FileExistsError):
            return open_new(path, mode)
        with suppress(FileNotFoundError):
            return open_old(path)


def _flock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if not os.fstat(fd).st_size:
            path.unlink()
        fact = "its file system has no locks"
        raise BusyError("E-NO-LOCKS", str(path), fact, hint="write to another one") from error


def close(fd: int) -> None:
    """Close a descriptor; interrupted, it is closed all the same, and what was synced stands."""
    with suppress(InterruptedError):
        os.close(fd)


def check_gives_way(path: Path) -> None:
    """OSError EPERM where a file is immutable or append-only, so that no other could take its name."""
    try:
        close(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
    except OSError as error:
        # What is merely not ours to write, a pipe or a link makes way for a rename.
        if error.errno == errno.EPERM:
            raise


def there(path: Path) -> bool:
    """Whether anything has this name, a dangling link too. OSError where that cannot be known."""
    with suppress(FileNotFoundError):
        path.lstat()
        return True
    return False


def same(fd: int, path: Path) -> bool:
    """Whether the name still means the open file."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.lstat())
    return False


def sync_folder(path: Path) -> None:
    """Bring the names in the folder of `path` to the disk."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some file systems have no such call and order renames themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        close(fd)
