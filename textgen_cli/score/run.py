"""The flow of score: records become questions, a scorer answers, figures go where they were asked for.

One text gives its figures; many records go through text/flow.py. Knows no torch: scorers are opened in scorers.py.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from textgen_cli.config import ScoreConfig
from textgen_cli.errors import TextgenError, UsageError
from textgen_cli.events import Report
from textgen_cli.model.fingerprint import given, of_model, of_program, of_weights
from textgen_cli.score import pairfiles
from textgen_cli.score.asked import Questioner
from textgen_cli.score.request import Asked, Figures, Scorer
from textgen_cli.score.scorers import open_scorer
from textgen_cli.score.summary import Corpus
from textgen_cli.text import flow
from textgen_cli.text.batch import Result, Summary, failure, joined
from textgen_cli.text.flow import Meter
from textgen_cli.text.records import Record

Encode = Callable[[dict[str, Any]], bytes]


def run(config: ScoreConfig, text: str, report: Report, *, detail: bool = False) -> Figures:
    """The figures of one text; `detail`: of its tokens too, where the model tells of any.

    Raises what `model.load` and the scorer raise.
    """
    questioner = Questioner(config.scoring, plain=True, named=False)
    asked = questioner(Record(0, {config.scoring.text_field: text}))
    scorer = open_scorer(config, report, detail=detail)
    _, found = next(iter(scorer.score([asked])))
    if isinstance(found, TextgenError):
        raise found
    return found


def run_batch(
    config: ScoreConfig, text: str | None, stdout: BinaryIO, report: Report, encode: Encode | None = None
) -> tuple[Summary, dict[str, Any]]:
    """Score every record of the input, or one text as a record, into the output file or `stdout`.

    `encode`: a result's fields as bytes for `stdout`; None: JSONL. Returns how the batch ended and the figures of the
    corpus. Raises what `flow.run` and `model.load` raise.
    """
    batching, scoring, form = config.batch, config.scoring, pairfiles.form_of(config)
    given_record = None if text is None else {scoring.text_field: text}
    plain = given_record is not None or form in ("text", "lines")
    if scoring.second is not None:
        pairfiles.check_lengths(batching, scoring.second)
    named = encode is None or batching.output is not None
    questioner = Questioner(scoring, plain=plain, named=named)
    corpus = Corpus(scoring)

    def compute(
        found: Iterator[Record], done: int, pinned: dict[str, Any], meter: Meter
    ) -> Iterator[list[Result]]:
        def opening() -> Scorer:
            scorer = open_scorer(config, report)
            meter.begin(done)
            return scorer

        def window(
            scorer: Scorer, members: Sequence[Record], finished: frozenset[int]
        ) -> Iterator[tuple[int, Result]]:
            return _window(questioner, scorer, members, finished)

        if scoring.second is not None:
            found = pairfiles.joined(found, scoring.text_field, scoring.second)
        return flow.results(found, done, flow.window(batching), opening, window)

    wing = flow.Wing(
        stage="score",
        field=scoring.text_field,
        form=form,
        fingerprint=lambda form, record, source: _fingerprint(config, form, record, source, report),
        compute=compute,
        encode=encode,
        seen=corpus.add,
    )
    summary = flow.run(wing, batching, given_record, stdout, report, {})
    return summary, corpus.figures()


def _window(
    questioner: Questioner, scorer: Scorer, members: Sequence[Record], finished: frozenset[int]
) -> Iterator[tuple[int, Result]]:
    """(record index, result) of each record of a window as it becomes whole; those `finished` need none."""
    questions: list[Asked] = []
    by_index = {record.index: record for record in members}
    for record in members:
        if record.error is not None:
            yield record.index, failure(record, record.error)
            continue
        try:
            questions.append(questioner(record))
        except UsageError:
            raise
        except TextgenError as error:
            yield record.index, failure(record, error)
    if not questions or len(finished) == len(members):
        return
    for index, found in scorer.score(questions, finished):
        record = by_index[index]
        if isinstance(found, TextgenError):
            yield index, failure(record, found)
        else:
            yield index, Result(record, [joined(record.fields, found)], tokens=found.get("tokens", 0))


def _fingerprint(
    config: ScoreConfig, form: str, record: dict[str, Any] | None, source: str | None, report: Report
) -> dict[str, Any]:
    """All that the output's bytes depend on."""
    found = of_program() | of_model(config.model, report)
    found["scoring"] = given(config.scoring, files=("template_file", "second"), secrets=("watermark",))
    found["explaining"] = given(config.explaining)
    if config.scoring.against is not None:
        found["scoring"]["against"] = of_weights(config.model, config.scoring.against, report)
    found |= {"format": form, "shard": config.batch.shard, "batch_size": config.batch.batch_size}
    return found | {"input": source if record is None else record}
