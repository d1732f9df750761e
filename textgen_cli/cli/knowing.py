"""How what is known of a model is told: for people with round figures on a terminal, else a fact a line.

It takes plain values and writes nothing.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from textgen_cli.text.figures import flat, scaled, shown, size
from textgen_cli.text.sanitize import clip

Row = tuple[str, str]
LONGEST = 1 << 16  # characters of a value


def lines(fields: Mapping[str, Any]) -> Iterator[str]:
    """What `--info` prints, from the fields of `inspect.Facts`."""
    if os.isatty(1):
        yield from _drawn([*_about(fields), *_parameters(fields), *_memory(fields), *_work(fields)])
        yield "\n"
        yield from _files(fields["files"])
        return
    yield from plain(fields)
    for file in fields["files"]:
        yield f"files.{shown(file['name'])}\t{file['size']}\n"


def plain(fields: Mapping[str, Any]) -> Iterator[str]:
    """A fact a line: name, tab, value."""
    return (f"{name}\t{_line(shown(value))}\n" for name, value in flat(fields))


def _line(text: str) -> str:
    """What a file says of itself, as one line in which nothing acts: with a line of its own it could forge a fact."""
    return clip(text, LONGEST)


def _drawn(rows: Iterable[Row]) -> Iterator[str]:
    """Names and values under one another, each line as wide as the terminal at most."""
    from textgen_cli.cli.render import aligned

    told = [(name, _line(value)) for name, value in rows]
    return (f"{line}\n" for line in aligned(told, shutil.get_terminal_size().columns))


def _files(files: list[Mapping[str, Any]]) -> Iterator[str]:
    from textgen_cli.cli.render import listing

    rows = [{"size": size(file["size"]), "file": file["name"]} for file in files]
    return (f"{line}\n" for line in listing(rows, shutil.get_terminal_size().columns))


def _about(fields: Mapping[str, Any]) -> Iterator[Row]:
    at = f", {fields['revision'][:12]}" if fields["revision"] else ""
    yield "model", f"{fields['model']} ({fields['source']}{at})"
    kind = f"{fields['type']}, {fields['family']}"
    yield "architecture", f"{fields['architecture']} ({kind})" if fields["architecture"] else kind
    yield "licence", fields["licence"] or "not told"
    yield "context", f"{fields['context']:,} tokens" if fields["context"] else "no limit of its own"
    yield "vocabulary", f"{fields['vocabulary']:,} tokens" if fields["vocabulary"] else "not told"
    yield "chat template", "yes" if fields["chat_template"] else "no"
    if "layers" not in fields:
        return
    stacks = (
        f"{fields['encoder_layers']} + {fields['layers']}" if "encoder_layers" in fields else fields["layers"]
    )
    shared = f", {fields['kv_heads']} of keys and values" if fields["kv_heads"] != fields["heads"] else ""
    experts = f", {fields['experts_a_token']} of {fields['experts']} experts" if "experts" in fields else ""
    yield "layers", f"{stacks} of {fields['hidden']:,}; feed-forward {fields['feed_forward']:,}{experts}"
    yield "heads", f"{fields['heads']} of {fields['head_size']}{shared}"
    if "window" in fields:
        yield "window", f"{fields['window']:,} tokens in {fields['windowed_layers']} layers"


def _parameters(fields: Mapping[str, Any]) -> Iterator[Row]:
    parts = fields["parameters"]
    if parts is None:
        yield "parameters", "stored in a form that does not tell them"
        return
    yield "parameters", scaled(parts["total"]).strip()
    for name, number in parts.items():
        if name == "head" and fields["tied"] and not number:
            yield "  head", "shared with the embeddings"
        elif name != "total":
            share = f"{100 * number / parts['total']:.1f} %"
            yield f"  {name.replace('_', '-')}", f"{scaled(number):>8}  {share:>6}"


def _memory(fields: Mapping[str, Any]) -> Iterator[Row]:
    for name, count in fields.get("weight_bytes", {}).items():
        yield f"weights in {name}", f"{size(count):>9}"
    for dtype, cache in fields.get("cache_bytes", {}).items():
        whole = f", {size(cache['context'])} for {fields['context']:,}" if "context" in cache else ""
        yield f"cache in {dtype}", f"{size(cache['token']):>9} a token{whole}"


def _work(fields: Mapping[str, Any]) -> Iterator[Row]:
    work = fields.get("flops")
    if work is None:
        return
    yield "work a token", f"{scaled(work['token'], 'FLOP')} = {work['formula']}"
    if "token_at_context" in work:
        yield "  at full context", scaled(work["token_at_context"], "FLOP")
    if "source_token" in work:
        yield "  of the source", scaled(work["source_token"], "FLOP")


# --- what work takes


def work_lines(fields: Mapping[str, Any]) -> Iterator[str]:
    """What `--for` prints, from the fields of `download.work.estimate`."""
    if os.isatty(1):
        yield from _drawn(_estimate(fields))
        return
    yield from plain({name: value for name, value in fields.items() if name != "ways"})
    for way in fields["ways"]:
        yield f"way\t{way['change']}\t{way['peak']}\t{shown(way['fits'])}\n"


def _estimate(fields: Mapping[str, Any]) -> Iterator[Row]:
    memory, compute = fields["memory"], fields["compute"]
    what = [fields["for"], fields["method"], fields["dtype"], fields["quantize"]]
    yield "model", fields["model"]
    rows = f"{fields['batch']:,} row{'s' * (fields['batch'] > 1)} of {fields['length']:,} tokens"
    yield "work", f"{', '.join(filter(None, what))} on {fields['device']}; {rows}"
    yield "memory at its peak", f"{size(memory['peak']):>9}"
    for name, count in memory.items():
        if name != "peak" and count:
            yield f"  {name}", f"{size(count):>9}"
    yield "free here", f"{size(fields['free']):>9}" if fields["free"] is not None else "not told"
    yield "fits", {True: "yes", False: "no", None: "not known"}[fields["fits"]]
    for way in fields["ways"]:
        yield "  with", f"{size(way['peak']):>9}{', fits' if way['fits'] else ''}: {way['change']}"
    yield "compute", f"{scaled(compute['flops'], 'FLOP')} = {compute['formula']}"
    yield (
        "time, about",
        f"{compute['seconds']:.3g} s a batch, {compute['tokens_a_second']:,.0f} tokens a second",
    )
    if "generated_a_second" in compute:
        yield "  generating", f"{compute['generated_a_second']:,.0f} tokens a second"
