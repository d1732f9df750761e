"""What tests of fetching share: a hub on the loopback, a cache of its files, and pauses that take no time."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from parts.hub import Hub


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as server:
        yield server


@pytest.fixture
def cache(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return server.use(monkeypatch, tmp_path / "hf")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses, which take no time."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses
