"""A page of results: plain values -> one self-contained HTML document. Loads nothing, runs one fixed script.

Each function makes a block of markup from values of any origin, all of it escaped; only blocks made here go into a
page. It does not know where figures come from nor where the page goes.
"""

import base64
import hashlib
import html
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NewType

from textgen_cli.text.chart import STYLE as CHART_STYLE
from textgen_cli.text.chart import Points, chart
from textgen_cli.text.explained import Grid
from textgen_cli.text.figures import flat, shown
from textgen_cli.text.heat import BLUE, DARK, LIGHT, ORANGE, STEPS, Entry, Piece, Ramp, Scale
from textgen_cli.text.sanitize import Sanitizer, visible

Block = NewType("Block", str)  # markup that this module made

# Parts of a text are laid out when they are seen, so that a long one is there at once.
PART = 4000  # characters after which the next line end ends a part
PARAGRAPH = 16_000  # characters without a line end after which a part ends all the same
NOTED = ("log_probability", "log_likelihood", "rank", "entropy")  # told of a piece
NOTE_TOP = 5  # alternatives told of a piece

STYLE = """
:root{color-scheme:light dark;--page:#fdfdfc;--ink:#1b1b1b;--soft:#5f6368;--line:#e3e3e0}
@media(prefers-color-scheme:dark){:root{--page:#16181b;--ink:#f0f0f0;--soft:#a0a4aa;--line:#33363b}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2.5rem 1.25rem 5rem;max-width:56rem;background:var(--page);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;font-weight:600;margin:0 0 1.5rem;overflow-wrap:anywhere}
h2{font-size:1rem;font-weight:600;margin:2.5rem 0 .75rem;overflow-wrap:anywhere}
p{color:var(--soft);margin:.5rem 0;overflow-wrap:anywhere}
.text{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9;margin:1rem 0 1.5rem}
.text div{unicode-bidi:plaintext;content-visibility:auto;contain-intrinsic-size:auto 60rem}
.text span{border-radius:.2em;padding:.12em 0}
.text span:hover{outline:1.5px solid var(--soft)}
.break::before{content:"↵";opacity:.55}
.legend{display:flex;flex-wrap:wrap;align-items:center;gap:.2rem .6rem;font-size:.85rem;color:var(--soft)}
.legend i{display:inline-block;width:min(1rem,3vw);height:.8rem}
.legend span{display:flex}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
th,td{padding:.3rem 1.25rem .3rem 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;
overflow-wrap:anywhere}
th{font-weight:400;color:var(--soft)}
.number,.figures td{text-align:right}
thead th{overflow-wrap:normal}
thead+tbody td[dir]{min-width:6.5rem}
.number{white-space:nowrap}
.grid{font-size:.8rem;border-collapse:separate;border-spacing:0}
.grid td,.grid th{padding:.15rem .35rem;border:solid var(--page);border-width:0 1px 1px 0;
white-space:pre;max-width:9rem;overflow:hidden;text-overflow:ellipsis}
.grid tbody td{min-width:1.4rem}
.grid tbody th{position:sticky;left:0;background:var(--page)}
.grid thead th{writing-mode:vertical-rl;transform:rotate(180deg);vertical-align:top;max-width:none;max-height:9rem}
.grid td:hover{outline:1.5px solid var(--soft)}
.wide+.legend,.attention+.legend{margin:.5rem 0 2rem}
.legend+.wide,.legend+.attention{margin-top:1.5rem}
.choice{display:flex;gap:1.25rem;margin:.5rem 0;font-size:.9rem;color:var(--soft)}
select{font:inherit}
.confusion td,.confusion th{padding:.3rem .8rem}
#note{position:fixed;z-index:1;max-width:24rem;padding:.5rem .75rem;border-radius:.4rem;background:var(--ink);
color:var(--page);font:.8rem/1.45 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;
pointer-events:none}
@media print{.text span{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.text div{content-visibility:visible}}
"""
# Shows a title at once and beside the pointer; without it, browsers show titles their own way.
SCRIPT = """
(() => {
  const note = document.getElementById("note");
  addEventListener("mouseover", event => {
    const piece = event.target.closest?.(".text span,.grid td");
    note.hidden = !piece;
    if (!piece) return;
    if (piece.title) { piece.dataset.note = piece.title; piece.removeAttribute("title"); }
    note.textContent = piece.dataset.note ?? "";
    note.hidden = !note.textContent;
    const box = note.getBoundingClientRect(), at = event.clientY + 20;
    note.style.left = Math.max(8, Math.min(event.clientX, innerWidth - box.width - 8)) + "px";
    note.style.top = (at + box.height > innerHeight ? event.clientY - box.height - 20 : at) + "px";
  });
  document.documentElement.addEventListener("mouseleave", () => { note.hidden = true; });
  // A matrix of attention: what is chosen of layers and heads is averaged and drawn into the same cells.
  for (const block of document.querySelectorAll(".attention")) {
    const bytes = Uint8Array.from(atob(block.dataset.values), letter => letter.charCodeAt(0));
    const values = new DataView(bytes.buffer);
    const [layers, heads] = [+block.dataset.layers, +block.dataset.heads];
    const cells = [...block.querySelectorAll("td")], size = cells.length;
    const names = [...block.querySelectorAll("tbody th")].map(head => head.textContent);
    const columns = [...block.querySelectorAll("thead th")].slice(1).map(head => head.textContent);
    const choices = [...block.querySelectorAll("select")];
    const draw = () => {
      const [layer, head] = choices.map(choice => choice.value);
      const sums = new Float64Array(size);
      let count = 0;
      for (let l = 0; l < layers; l++) for (let h = 0; h < heads; h++) {
        if (layer !== "" && +layer !== l || head !== "" && +head !== h) continue;
        count += 1;
        const start = (l * heads + h) * size;
        for (let at = 0; at < size; at++) sums[at] += values.getUint16(2 * (start + at), true) / 65535;
      }
      cells.forEach((cell, at) => {
        const value = sums[at] / count, step = Math.trunc(10 * Math.sqrt(value));
        const [row, column] = [Math.floor(at / columns.length), at % columns.length];
        cell.className = step ? "p" + step : "";
        cell.dataset.note = `${names[row]} looks at ${columns[column]}: ${value.toFixed(4)}`;
        cell.removeAttribute("title");
      });
    };
    choices.forEach(choice => choice.addEventListener("change", draw));
    draw();
  }
})();
"""


def page(title: str, blocks: Iterable[Block]) -> str:
    """The whole document."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = (
        '<!doctype html>\n<html>\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_safe(title)}</title>\n<style>{STYLE}{CHART_STYLE}{_colours(LIGHT)}\n"
        f"@media(prefers-color-scheme:dark){{\n{_colours(DARK)}\n}}\n</style>\n</head>\n"
    )
    body = "\n".join([f'<h1 dir="auto">{_safe(title)}</h1>', *blocks, '<div id="note" hidden></div>'])
    return f"{head}<body>\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"


def heading(text: str) -> Block:
    """A line above what follows."""
    return Block(f'<h2 dir="auto">{_safe(text)}</h2>')


def paragraph(text: str) -> Block:
    """A remark."""
    return Block(f'<p dir="auto">{_safe(text)}</p>')


def heat_map(pieces: Iterable[Piece], scale: Scale, notes: Iterable[str]) -> Block:
    """A text, the background of each piece as strong as its weight, and what its colours mean.

    `notes`: what is told of each piece where the pointer rests on it; "" for nothing.
    """
    sanitizer = Sanitizer()
    parts, size = ['<div class="text"><div dir="auto">'], 0
    for (text, weight), note in zip(pieces, notes, strict=True):
        drawn = sanitizer.feed(text)
        parts.append(_span(drawn, scale.step(weight), note))
        size += len(drawn)
        if size >= (PART if drawn.endswith("\n") else PARAGRAPH):
            parts.append('</div><div dir="auto">')
            size = 0
    parts.append("</div></div>")
    return Block("".join(parts) + "\n" + _legend(scale))


def _span(drawn: str, step: int, note: str) -> str:
    if not (step or note):
        return html.escape(drawn)
    # Blanks before a word stay uncoloured; blanks alone are all there is to see.
    word = drawn.lstrip(" ") or drawn
    names = [f"{'p' if step > 0 else 'm'}{abs(step)}"] if step else []
    names += ["break"] if step and not word.strip() and "\n" in word else []
    marks = f' class="{" ".join(names)}"' if names else ""
    marks += f' title="{_safe(note)}"' if note else ""
    return f"{drawn[: len(drawn) - len(word)]}<span{marks}>{html.escape(word)}</span>"


def _legend(scale: Scale) -> str:
    what = f"{scale.name} in {scale.unit}" if scale.unit else scale.name
    swatches = [f'<i class="p{step}"></i>' for step in range(1, STEPS + 1)]
    before = ""
    if scale.signed:
        below = "".join(f'<i class="m{step}"></i>' for step in range(STEPS, 0, -1))
        before = f"−{scale.high:g} <span>{below}</span> "
    end = f"{scale.high:g}" + ("" if scale.signed else " and more")
    return f'<div class="legend">{_safe(what)} {before}0 <span>{"".join(swatches)}</span> {end}</div>'


def _colours(ramp: Ramp) -> str:
    return "\n".join(
        f".{sign}{step}{{background:{colour};color:{ramp.ink}}}"
        for sign, hue in (("p", ORANGE), ("m", BLUE))
        for step, colour in enumerate(ramp.colours(hue), 1)
    )


def note(entries: Sequence[Entry]) -> str:
    """What is told of a piece: its token or word with log-probability, rank, entropy and the likeliest alternatives."""
    lines = []
    for entry in entries:
        lines.append(repr(entry.get("token", entry.get("word", ""))))
        told = [name for name in NOTED if entry.get(name) is not None]
        lines += [f"{name.replace('_', '-')} {shown(entry[name])}" for name in told]
        tops = entry.get("top", ())[:NOTE_TOP]
        lines += [f"{shown(other['log_probability']):>9}  {other['token']!r}" for other in tops]
    return "\n".join(lines)


def figures(values: Mapping[str, Any]) -> Block:
    """A table of names and values, nested names joined by points; lists of records are left out."""
    rows = "".join(
        f'<tr><th scope="row">{_safe(name)}</th>{_cell(value, _is_number(value))}</tr>'
        for name, value in flat(values)
    )
    return Block(f'<div class="wide"><table class="figures">{rows}</table></div>')


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Block:
    """A table with a head; columns of numbers stand on the right."""
    numeric = [any(_is_number(row[at]) for row in rows) for at in range(len(head))]
    heads = "".join(
        f'<th scope="col"{_NUMBER if right else ""}>{_safe(name)}</th>'
        for name, right in zip(head, numeric, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row, numeric))}</tr>" for row in rows)
    return Block(
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def charts(several: Iterable[Mapping[str, Points]]) -> Block:
    """Pictures side by side, each with its curves by name; one without points is left out."""
    drawn = [f"<div>{picture}</div>" for curves in several if (picture := chart(curves))]
    return Block(f'<div class="charts">{"".join(drawn)}</div>')


def confusion(counts: Mapping[str, Mapping[str, int]]) -> Block:
    """How often each class (a row) was taken for which (a column); a cell is as strong as its share of its row."""
    names = list(counts)
    heads = "".join(f'<th scope="col"{_NUMBER}>{_safe(name)}</th>' for name in names)
    rows = []
    for name in names:
        total = sum(counts[name].values()) or 1
        cells = "".join(_shaded(counts[name].get(other, 0), total) for other in names)
        rows.append(f'<tr><th scope="row">{_safe(name)}</th>{cells}</tr>')
    head = f'<tr><th scope="col">right ↓ predicted →</th>{heads}</tr>'
    return Block(
        f'<div class="wide"><table class="confusion"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _shaded(count: int, total: int) -> str:
    step = round(count / total * STEPS)
    return f'<td class="number{f" p{step}" if step else ""}">{count}</td>'


def grid(found: Grid) -> Block:
    """What goes with what: a table of coloured cells, and what its colours mean."""
    return Block(f'<div class="wide">{_grid(found)}</div>\n{_legend(found.scale)}')


def attention(found: Grid, layers: Sequence[Sequence[Sequence[Sequence[float]]]]) -> Block:
    """Such a table with layers and heads to choose from: weights by layer, head, row and column, from 0 to 1."""
    counts = len(layers), len(layers[0])
    whole = array("H", (round(v * 65535) for layer in layers for head in layer for row in head for v in row))
    if sys.byteorder == "big":
        whole.byteswap()
    data = base64.b64encode(whole.tobytes()).decode()
    choices = "".join(
        f'<label>{name} <select><option value="">mean</option>'
        + "".join(f'<option value="{number}">{number}</option>' for number in range(count))
        + "</select></label>"
        for name, count in zip(("layer", "head"), counts, strict=True)
    )
    return Block(
        f'<div class="attention" data-layers="{counts[0]}" data-heads="{counts[1]}" data-values="{data}">'
        f'<div class="choice">{choices}</div><div class="wide">{_grid(found)}</div></div>\n{_legend(found.scale)}'
    )


def _grid(found: Grid) -> str:
    heads = "".join(f'<th scope="col">{_safe(name)}</th>' for name in found.columns)
    texts = found.texts or [[""] * len(found.columns)] * len(found.rows)
    rows = []
    for name, shades, notes, own in zip(found.rows, found.shades, found.notes, texts, strict=True):
        cells = []
        for shade, note, text in zip(shades, notes, own, strict=True):
            step = found.scale.step(shade)
            mark = f' class="{"p" if step > 0 else "m"}{abs(step)}"' if step else ""
            cells.append(f'<td{mark} title="{_safe(note)}">{_safe(text)}</td>')
        rows.append(f'<tr><th scope="row">{_safe(name)}</th>{"".join(cells)}</tr>')
    head = f'<thead><tr><th scope="col"></th>{heads}</tr></thead>'
    return f'<table class="grid">{head}<tbody>{"".join(rows)}</tbody></table>'


_NUMBER, _AUTO = ' class="number"', ' dir="auto"'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any, right: bool) -> str:
    return f"<td{_NUMBER if right else _AUTO}>{_safe(shown(value))}</td>"


def _safe(text: str) -> str:
    """Text of any origin as text of the page, hidden and control characters shown."""
    return html.escape(visible(text))
