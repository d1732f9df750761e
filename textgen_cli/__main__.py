"""The entry of the program: the few things that must happen before the face is imported.

It owns the descriptors 0 to 2, the interpreter's settings and the exit; it knows no command.
"""

import gc
import os
import signal
import sys
from typing import NoReturn


def open_missing_descriptors() -> frozenset[int]:
    """Open those of the descriptors 0 to 2 that are closed on the null device; returns which they were.

    Otherwise the next file opened would take the number, and messages would land inside it.
    """
    closed = set()
    for descriptor, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is not None:
            continue
        closed.add(descriptor)
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is given out: it is this one, since those below are open by now.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    return frozenset(closed)


def forget_script_folder() -> None:
    """Import nothing from the script's folder or, under `python -m`, the current one."""
    package_parent = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 - pathlib is slow to import
    if not sys.flags.safe_path and sys.path and sys.path[0] != package_parent:
        del sys.path[0]


def main() -> NoReturn:
    """Run the program with the arguments of the process, and leave with its exit code."""
    closed = open_missing_descriptors()
    # Until the face is there to clean up there is nothing to clean up: Ctrl-C ends the process at once.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    forget_script_folder()
    # Importing creates objects that all stay: collecting between them costs a third of a cold start.
    gc.disable()
    from textgen_cli.cli.app import run
    from textgen_cli.model import lean

    lean.allowed = True
    code = run(sys.argv[1:], closed)
    # Everything is written and closed by now: taking thousands of modules apart first would only cost time.
    os._exit(code)


if __name__ == "__main__":
    main()
