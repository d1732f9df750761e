"""The program as a process that is hurt while it runs: signals, files that change, system calls that fail.

The program itself is that of `program.py`; here stands what is done to it.
"""

import ctypes
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 60  # seconds
IN_OPEN = 0x20  # linux/inotify.h

# Fails the N-th call of one kind that concerns a file whose name holds FAULT_FILE (fsync: or its folder):
# FAULT="call:N:errno", N = 0 means all of them. FAULT="short" lets each write take half. FAULT="interrupted" lets
# the first call of each kind that knows EINTR fail with it, and every other one after it. Read at each call, so that
# a process can be hurt that was forked from a sound one.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int seen;

static int concerns(const char *path, int folders) {
    const char *file = getenv("FAULT_FILE");
    if (!file) return 0;
    const char *name = strrchr(file, '/') + 1;
    size_t folder = name - 1 - file;
    return strstr(path, name) || (folders && strlen(path) == folder && !strncmp(path, file, folder));
}

static int is_turn(const char *call) {
    static const char *kinds[16];
    static unsigned calls[16];
    int kind = 0;
    while (kinds[kind] && strcmp(kinds[kind], call)) kind++;
    kinds[kind] = call;
    return calls[kind]++ % 2 == 0;
}

static int fails(const char *call, int fd, const char *path) {
    const char *fault = getenv("FAULT");
    char link[64], target[4096], wanted[32];
    int number, error, often = fault && !strcmp(fault, "interrupted");
    if (!fault || (often && path && strcmp(call, "open"))) return 0;
    if (!often && (sscanf(fault, "%31[a-z]:%d:%d", wanted, &number, &error) != 3 || strcmp(wanted, call))) return 0;
    if (!path) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t size = readlink(link, target, sizeof target - 1);
        if (size < 0) return 0;
        target[size] = 0;
        path = target;
    }
    if (!concerns(path, !strcmp(call, "fsync"))) return 0;
    if (often ? !is_turn(call) : ++seen != number && number) return 0;
    errno = often ? EINTR : error;
    return 1;
}

#define NEXT(name) static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
    NEXT(write);
    const char *fault = getenv("FAULT");
    if (fault && !strcmp(fault, "short") && fd > 2) return real(fd, data, size > 1 ? (size + 1) / 2 : size);
    return fails("write", fd, NULL) ? -1 : real(fd, data, size);
}
int fsync(int fd) { NEXT(fsync); return fails("fsync", fd, NULL) ? -1 : real(fd); }
int ftruncate(int fd, off_t size) { NEXT(ftruncate); return fails("ftruncate", fd, NULL) ? -1 : real(fd, size); }
int ftruncate64(int fd, off64_t size) { NEXT(ftruncate64); return fails("ftruncate", fd, NULL) ? -1 : real(fd, size); }
int close(int fd) {
    NEXT(close);
    int failed = fails("close", fd, NULL), error = errno;
    int status = real(fd);
    if (failed) errno = error;
    return failed ? -1 : status;
}
int flock(int fd, int how) {
    static int (*real)(int, int);
    if (!real) real = dlsym(RTLD_NEXT, "flock");
    return fails("flock", fd, NULL) ? -1 : real(fd, how);
}
int open64(const char *path, int flags, ...) {
    NEXT(open64);
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    return fails("open", 0, path) ? -1 : real(path, flags, mode);
}
int rename(const char *from, const char *to) { NEXT(rename); return fails("rename", 0, to) ? -1 : real(from, to); }
int unlink(const char *path) { NEXT(unlink); return fails("unlink", 0, path) ? -1 : real(path); }
ssize_t readv(int fd, const struct iovec *into, int count) {
    NEXT(readv);
    return fails("readv", fd, NULL) ? -1 : real(fd, into, count);
}
"""


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for it, and fail where it does not come."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def written(out: Path, size: int = 1) -> Callable[[], bool]:
    """Whether so many bytes of a job's results are there."""
    partial = Path(f"{out}.partial")
    return lambda: partial.exists() and partial.stat().st_size >= size


@contextmanager
def opened(file: Path) -> Iterator[Callable[[], bool]]:
    """Whether any process has opened the file since, however shortly: told by the kernel (inotify)."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert watch >= 0 and libc.inotify_add_watch(watch, os.fsencode(file), IN_OPEN) >= 0, ctypes.get_errno()

    def happened() -> bool:
        try:
            return bool(os.read(watch, 4096))
        except BlockingIOError:
            return False

    try:
        yield happened
    finally:
        os.close(watch)


def limit_files(pid: int, size: int) -> None:
    """No file of the process may grow beyond so many bytes."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))
