"""How memory and the time of a record grow with their number: tiny records through a tiny model, against itself.

The figure of memory is bytes over bytes. The cost of a record is taken behind one whole window of records, when the
model is loaded, until the last line is written; 100,000 of them are measured without --quick alone. What a process does
once for each shape of a batch, the code that its products are compiled to, a run in front has done.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks import peers
from benchmarks.runner import Ratio, Run, Side, compare

# The whole command, with a stream for its output that sees when each line comes.
OURS = """
import io, json, sys, time
from pathlib import Path
from textgen_cli.config import BatchConfig, DecodingConfig, GenerateConfig, ModelConfig
from textgen_cli.events import silent
from textgen_cli.generate.run import run_batch
from textgen_cli.text.flow import WINDOW
model, path, warm = sys.argv[1:]
class Lines(io.RawIOBase):
    count, began, ended = 0, 0.0, 0.0
    def writable(self):
        return True
    def write(self, data):
        before, self.count = self.count, self.count + bytes(data).count(b"\\n")
        self.ended = time.perf_counter()
        if before < WINDOW <= self.count:
            self.began, self.behind = self.ended, self.count
        return len(data)
def run(path):
    lines = Lines()
    config = GenerateConfig(
        model=ModelConfig(model=model),
        decoding=DecodingConfig(greedy=True, max_new_tokens=1),
        batch=BatchConfig(input=Path(path), jsonl=True),
    )
    run_batch(config, None, lines, silent)
    return lines
run(warm)
lines = run(path)
print(json.dumps({"seconds": lines.ended - lines.began, "tokens": lines.count - lines.behind, "texts": []}))
"""
WINDOW = 512  # records in front of those whose time is taken
FEW, MANY, MORE = 2_000, 200_000, 50e6  # records, and bytes that the second may take besides


def run(quick: bool, only: str | None = None) -> Iterator[list[Ratio]]:
    """Memory, then time."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = _tiny(folder / "tiny")
        for step in peers.chosen(ROWS, only):
            yield step(folder, model, quick)


def memory(folder: Path, model: str, quick: bool) -> list[Ratio]:
    """Peak of the command with an output file."""
    runs = [_whole(folder, model, count) for count in (FEW, MANY)]
    few, many = (replace(run, seconds=float(run.peak)) for run in runs)
    print(
        f"peak memory: {FEW:,} records {few.peak / 1e6:,.0f} MB, {MANY:,} records {many.peak / 1e6:,.0f} MB"
    )
    allowed = replace(few, seconds=few.peak + MORE)
    return [
        Ratio(f"peak memory of {MANY:,} tiny records / that of {FEW:,} and 50 MB", [many], [allowed], 1.0)
    ]


def records(folder: Path, model: str, quick: bool) -> list[Ratio]:
    """Cost of a record, with more and more of them."""
    rounds = 3 if quick else 5
    base = _behind_a_window(folder, model, 1_000)
    return [
        compare(f"a record of {count:,} / of 1,000", _behind_a_window(folder, model, count), base,
                rounds=rounds, target=1.1)
        for count in ((100, 10_000) if quick else (100, 10_000, 100_000))
    ]  # fmt: skip


ROWS: dict[str, Callable[[Path, str, bool], list[Ratio]]] = {"memory": memory, "records": records}


def _whole(folder: Path, model: str, count: int) -> Run:
    out = folder / f"{count}.out.jsonl"
    options = ["-m", model, "-i", str(_file(folder, count)), "-o", str(out), "-n", "1", "--greedy"]
    done = Side(f"{count:,} records", [sys.executable, "-m", "textgen_cli", "generate", *options])()
    with out.open("rb") as file:
        if (lines := sum(b'"completion_tokens": 1' in line for line in file)) != count:
            raise RuntimeError(f"{lines:,} records have their token, {count:,} were given")
    return done


def _behind_a_window(folder: Path, model: str, count: int) -> Callable[[], Run]:
    path, warm = _file(folder, WINDOW + count), _file(folder, WINDOW + min(count, 1_000))
    measured = peers.timed([sys.executable, "-c", OURS, model, str(path), str(warm)])

    def run() -> Run:
        found = measured()
        if (done := json.loads(found.output)[0]) != count:
            raise RuntimeError(f"{done:,} records behind the first {WINDOW}, {count:,} were given")
        return found

    return run


def _file(folder: Path, count: int) -> Path:
    path = folder / f"{count}.jsonl"
    if not path.exists():
        with path.open("w") as file:
            for number in range(count):
                # All of one length: which lengths share a batch must not decide what a record costs.
                file.write(json.dumps({"id": number, "prompt": "once upon a time once upon a time"}) + "\n")
    return path


def _tiny(folder: Path) -> str:
    """The tests' smallest model."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from parts.models import build

    folder.mkdir()
    build("tiny", folder)
    return str(folder)
