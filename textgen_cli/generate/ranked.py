"""Several fillings or answers of one text as lines for people and pipes. Plain Python."""

from dataclasses import replace

from textgen_cli.generate.request import Chunk


def as_lines(chunk: Chunk) -> Chunk:
    """The chunk with a line for each alternative, `probability<TAB>text` or `score<TAB>answer`, where it has several.

    A text with several gaps has no such list: it stays the text with the best of each.
    """
    extra = chunk.final.extra if chunk.final else {}
    found, weight = extra.get("answers", []), "score"
    if len(extra.get("fillings", [])) == 1 and len(extra["fillings"][0]) > 1:
        [found], weight = extra["fillings"], "probability"
    if not found:
        return chunk
    lines = (f"{entry[weight]:#.4g}\t{' '.join(entry['text'].splitlines())}" for entry in found)
    return replace(chunk, text="\n".join(lines))


def unseen(chunk: Chunk) -> int:
    """How many gaps a text has whose fillings `as_lines` leaves out."""
    gaps = chunk.final.extra.get("fillings", []) if chunk.final else []
    return len(gaps) if len(gaps) > 1 and len(gaps[0]) > 1 else 0
