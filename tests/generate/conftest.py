"""The program to be hurt by system calls that fail, started once for all tests that hurt it."""

from collections.abc import Iterator

import pytest
from parts.faults import preloaded
from parts.hurt import SHIM
from parts.program import Program


@pytest.fixture(name="shimmed", scope="session")
def _shimmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """The program with system calls that fail on request."""
    with preloaded(tmp_path_factory.mktemp("shim"), SHIM) as environment:
        program = Program(LD_PRELOAD=environment["LD_PRELOAD"])
        yield program
        program.close()
