"""One reading of all rows: good ones go to disk as examples, bad ones are counted and told.

Keeps in memory of each example what the split needs, 24 bytes. Knows neither the split nor the model.
"""

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from textgen_cli.config.finetune import DataConfig
from textgen_cli.errors import InputError
from textgen_cli.events import Notice, Progress, Report
from textgen_cli.finetune import spool
from textgen_cli.finetune.labels import Labels
from textgen_cli.finetune.rows import STDIN, Row, read
from textgen_cli.finetune.split import key_of
from textgen_cli.finetune.tasks import TASKS, Binding, Example, example

TOLD = 20  # bad rows that are told one by one
PULSE = 5000  # rows between two events of progress

Numbered = tuple[int, Row]  # the number of its file, and a row


@dataclass
class Tally:
    """What was read so far, by file."""

    paths: Sequence[Path]
    rows: Counter[int] = field(default_factory=Counter)
    bad: Counter[int] = field(default_factory=Counter)
    told: list[tuple[int, str, str]] = field(default_factory=list)  # file, place, fact of the first bad rows

    def refuse(self, file: int, place: str, fact: str) -> None:
        """Count a bad row."""
        self.bad[file] += 1
        if len(self.told) < TOLD:
            self.told.append((file, place, fact))

    def names(self) -> list[str]:
        """The files without their folders, told apart by a number where two have one name."""
        plain = ["stdin" if path == STDIN else path.name for path in self.paths]
        return [
            f"{name} ({plain[:number].count(name) + 1})" if plain.count(name) > 1 else name
            for number, name in enumerate(plain)
        ]

    def facts(self) -> dict[str, Any]:
        names = self.names()
        files = {name: {"rows": self.rows[i], "bad": self.bad[i]} for i, name in enumerate(names)}
        bad = [{"file": names[file], "place": place, "fact": fact} for file, place, fact in self.told]
        return {"rows": self.rows.total(), "bad_rows": self.bad.total(), "files": files, "bad": bad}

    def empty(self, files: Iterable[int]) -> InputError:
        """What to raise where no row of these files is good."""
        bad = sum(self.bad[number] for number in files)
        fact = f"no row is usable: all {bad:,} are bad" if bad else "no rows"
        names = self.names()
        return InputError("E-EMPTY", ", ".join(names[number] for number in files) or "data", fact)

    def tell(self, data: DataConfig, report: Report) -> None:
        """Say the first bad rows one by one, and how many more there are."""
        for file, place, fact in self.told:
            name = "stdin" if self.paths[file] == STDIN else str(self.paths[file])
            report(Notice(f"{name}: {place}: {fact}", "W-ROW"))
        for number, name in enumerate(self.names()):
            if self.rows.total() and self.rows.get(number) == 0:
                report(Notice(f"{name} holds no rows", "W-EMPTY"))
        bad = self.bad.total()
        if bad > len(self.told):
            report(Notice(f"{bad - len(self.told):,} more rows are bad", "W-ROW"))
        if 0 < bad <= data.skip_bad:
            report(Notice(f"{bad:,} of {self.rows.total():,} rows are bad and left out", "W-SKIPPED"))


@dataclass
class Side:
    """The good examples of the training or the held-out files: on disk, and what is kept of each in memory."""

    path: Path
    keys: "array[int]" = field(default_factory=lambda: array("Q"))  # see split.key_of
    strata: "array[int]" = field(default_factory=lambda: array("i"))  # numbers of labels
    files: "array[int]" = field(default_factory=lambda: array("i"))
    lines: "array[int]" = field(default_factory=lambda: array("Q"))


def rows_of(files: Iterable[int], tally: Tally, data: DataConfig, report: Report) -> Iterator[Numbered]:
    """The rows of some of the files, counted. Raises what `rows.read` raises."""
    for number in files:
        tally.rows[number] = 0
        for row in read(tally.paths[number], data, report):
            tally.rows[number] += 1
            if tally.rows.total() % PULSE == 0:
                report(Progress("check", tally.paths[number].name, tally.rows.total(), None, "rows"))
            yield number, row


@dataclass
class Intake:
    """Rows in, examples on disk; labels are counted over all of them."""

    binding: Binding
    tally: Tally
    seed: int
    prefix: str = ""  # before every source
    labels: Labels = field(default_factory=Labels)
    tags: Counter[str] = field(default_factory=Counter)
    unanswerable: int = 0
    units: dict[int, str] = field(
        default_factory=dict
    )  # file -> what its places count: line, row or question
    unlearnt: set[str] = field(default_factory=set)  # names that the held-out files alone have
    _numbers: dict[str, int] = field(default_factory=dict)  # label -> its stratum

    def spool(self, rows: Iterable[Numbered], path: Path) -> Side:
        """Write the good examples of some rows to a file. OutputError E-WRITE where the disk fails."""
        task = TASKS[self.binding.task]
        side = Side(path)
        with spool.Writer(path, task.schema) as writer:
            for file, row in rows:
                found = row.fact or self._good(row)
                if isinstance(found, str):
                    self.tally.refuse(file, row.place, found)
                    continue
                content = json.dumps([found[name] for name in task.key], ensure_ascii=False)
                side.keys.append(key_of(content, self.seed))
                side.strata.append(self._stratum(found))
                unit, _, line = row.place.rpartition(" ")
                self.units[file] = unit
                side.files.append(file)
                side.lines.append(int(line))
                writer.add(found, len(content))
        return side

    def hold_out(self, rows: Iterable[Numbered], path: Path) -> Side:
        """`spool` the rows of held-out files, when those to learn from are read."""
        learnt = set(self.labels.counts) | set(self.tags)
        side = self.spool(rows, path)
        self.unlearnt = (set(self.labels.counts) | set(self.tags)) - learnt
        return side

    def _good(self, row: Row) -> Example | str:
        found = example(self.binding, row.fields)
        if isinstance(found, str):
            return found
        if self.prefix:
            found["source"] = self.prefix + found["source"]
        if self.binding.task == "text-classification":
            fact = self.labels.add(json.loads(found["label"]))
            return found if fact is None else fact
        if self.binding.task == "token-classification":
            self.tags.update(found["tags"])
        self.unanswerable += found.get("answers") == []
        return found

    def _stratum(self, found: Example) -> int:
        """The number of an example's one label; 0 where there is none."""
        if self.binding.task != "text-classification" or self.labels.lists:
            return 0
        return self._numbers.setdefault(found["label"], len(self._numbers))

    def locator(self, files: Sequence[int], lines: Sequence[int]) -> Callable[[int], dict[str, str]]:
        """A function that tells the file and the place of an example by its number."""
        names = self.tally.names()
        return lambda at: {
            "file": names[files[at]],
            "place": f"{self.units[int(files[at])]} {lines[at]}",
        }

    def facts(self, problem: str | None) -> dict[str, Any]:
        """Labels as --check tells them: how many of each, the most frequent first."""
        if self.binding.task == "question-answering":
            return {"unanswerable": self.unanswerable}
        found: dict[str, Any] = {"problem": problem} if problem else {}
        if problem == "regression":
            return found | {"smallest": self.labels.low, "largest": self.labels.high}
        counts = self.labels.counts if problem else self.tags
        ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        return found | ({"labels": dict(ranked)} if ranked else {})
