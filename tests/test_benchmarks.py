"""What benchmarks count and how a row is named; how fast anything is, is no test's matter."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from textgen_cli.config import ModelConfig
from textgen_cli.model import device, speed


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)


def test_the_limits_are_work_done_over_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock says half a second: what was computed, where and in which dtype, is real."""
    from benchmarks import limits

    made = []

    def half(run: Callable[[], torch.Tensor], placement: device.Placement, seconds: float) -> float:
        made.append(run())
        return 0.5

    monkeypatch.setattr(speed, "mean", half)
    placement = device.place(ModelConfig(device="cpu", dtype="bfloat16"), "generate")
    assert limits.bandwidth(placement, 1000) == 4 * 1000 / 0.5
    assert float(made[0]) == 1000  # each of the ones was read
    assert limits.matrix_rate(placement, 32) == 2 * 32**3 / 0.5
    assert (made[-1].shape, made[-1].dtype) == ((32, 32), torch.bfloat16)


def test_a_row_that_a_benchmark_has_not() -> None:
    from benchmarks import peers

    assert peers.chosen({"one": 1, "two": 2}, None) == [1, 2]
    assert peers.chosen({"one": 1, "two": 2}, "two") == [2]
    with pytest.raises(SystemExit, match="--only: one of one, two"):
        peers.chosen({"one": 1, "two": 2}, "three")
