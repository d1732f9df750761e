"""What the flow of many records gathers before it computes."""

import io
from collections.abc import Iterator

from textgen_cli.text import flow, lines, records
from textgen_cli.text.batch import Result
from textgen_cli.text.records import Record


def test_a_window_of_long_lines_ends_by_its_bytes() -> None:
    """Memory holds windows of the longest lines: 512 of them would be 8 GiB."""
    line = b"a" * (lines.LINE_LIMIT - 1) + b"\n"
    held: list[int] = []

    def compute(
        opened: None, members: list[Record], finished: frozenset[int]
    ) -> Iterator[tuple[int, Result]]:
        held.append(len(members))
        return iter([(record.index, Result(record, [])) for record in members])

    found = records.read(io.BytesIO(line * 4), "lines")
    groups = list(flow.results(found, 0, flow.WINDOW, lambda: None, compute))
    assert [result.record.index for group in groups for result in group] == [0, 1, 2, 3]
    assert held == [3, 1]  # the third brings it over 32 MiB
