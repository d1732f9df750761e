"""How much memory is left here for a process of ours. Asks the system, imports no library."""

import contextlib
import os
import re
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def free() -> int | None:
    """Bytes of main memory that may still be taken: what the system has left, or less where a container has a limit.

    What the system would give back from its caches counts as left; None where nobody tells.
    """
    return min((found for found in (_system(), _container()) if found is not None), default=None)


def _system() -> int | None:
    with contextlib.suppress(OSError):
        match = re.search(
            r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text("ascii"), re.MULTILINE
        )
        if match:
            return int(match[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # no Linux: all there is, for what is left is not told
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _container() -> int | None:
    """What a control group of Linux (version 2, the one that a container sees as its root) has left."""
    with contextlib.suppress(OSError, ValueError):
        limit = (_CGROUPS / "memory.max").read_text("ascii").strip()
        used = int((_CGROUPS / "memory.current").read_text("ascii"))
        cached = re.search(
            r"^inactive_file (\d+)", (_CGROUPS / "memory.stat").read_text("ascii"), re.MULTILINE
        )
        if limit != "max":
            return max(int(limit) - used + (int(cached[1]) if cached else 0), 0)
    return None


def taken() -> int | None:
    """Bytes of main memory that this process holds now; None where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None
