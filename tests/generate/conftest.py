"""The program to be hurt, started once for all tests that hurt it."""

from collections.abc import Iterator

import pytest
from parts.faults import preloaded
from parts.hurt import SHIM, Patient


@pytest.fixture(name="patient", scope="session")
def _patient() -> Iterator[Patient]:
    patient = Patient()
    yield patient
    patient.close()


@pytest.fixture(name="shimmed", scope="session")
def _shimmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Patient]:
    """The program with system calls that fail on request."""
    with preloaded(tmp_path_factory.mktemp("shim"), SHIM) as environment:
        patient = Patient(LD_PRELOAD=environment["LD_PRELOAD"])
        yield patient
        patient.close()
