"""The page: whatever a text holds stays text, nothing is loaded, one known script runs."""

import base64
import hashlib
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parts.browser import opened

from textgen_cli.text import page
from textgen_cli.text.explained import Grid
from textgen_cli.text.heat import Scale, surprisal
from textgen_cli.text.sanitize import visible

NATS = surprisal("nats")
TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "span", "i", "table", "thead",
    "tbody", "tr", "th", "td", "script",
}  # fmt: skip
ATTRIBUTES = {"charset", "http-equiv", "content", "name", "class", "title", "dir", "id", "hidden", "scope"}
HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "--><!-- </style><style>*{background:url(//x)}",
    "</div></div><iframe src=//x>",
    "\" onmouseover=alert(1) x='",
    "&lt;b&gt; &amp;amp; &#x202e;",
    "\x00\x1b[31m\r\u202e\u2028\ud800",
]


class Document(HTMLParser):
    """What a reader of the page gets: tags, attributes, and the text inside each kind of tag."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str]] = []
        self.text = ""  # of the coloured text
        self.all = ""  # outside script and style
        self.script = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if ("div", "text") in self.open:
            self.text += data
        if ("script", "") in self.open:
            self.script += data
        elif ("style", "") not in self.open:
            self.all += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_a_text_stays_text(hostile: str) -> None:
    source = page.page(
        hostile,
        [
            page.heading(hostile),
            page.paragraph(hostile),
            page.heat_map(
                [(hostile, 9.0), (hostile, None)], Scale(hostile, hostile, 10.0), [hostile, hostile]
            ),
            page.figures({hostile: {hostile: hostile}}),
            page.table([hostile], [[hostile], [[hostile]]]),
        ],
    )
    document = Document(source)
    assert {tag for tag, _ in document.tags} <= TAGS
    assert {name for _, attributes in document.tags for name in attributes} <= ATTRIBUTES
    assert document.script == page.SCRIPT
    assert document.text == 2 * visible(hostile)
    assert document.all.count(visible(hostile)) == 14
    assert [a["title"] for _, a in document.tags if "title" in a] == 2 * [visible(hostile)]
    source.encode()


@given(st.lists(st.tuples(st.text(), st.none() | st.floats(), st.text()), max_size=8))
def test_pieces_join_to_the_text(pieces: list[tuple[str, float | None, str]]) -> None:
    block = page.heat_map([(t, w) for t, w, _ in pieces], NATS, [n for _, _, n in pieces])
    assert Document(block).text == visible("".join(text for text, _, _ in pieces))


def test_a_page_loads_nothing_and_runs_one_script() -> None:
    source = page.page("x", [])
    digest = base64.b64encode(hashlib.sha256(Document(source).script.encode()).digest()).decode()
    policies = [a["content"] for _, a in Document(source).tags if "http-equiv" in a]
    assert policies == [f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"]
    assert not re.search(r"url\(|@import|https?:|<link|innerHTML", source)
    assert source.startswith('<!doctype html>\n<html>\n<head>\n<meta charset="utf-8">')


def test_colours_and_notes() -> None:
    block = page.heat_map(
        [("The", None), (" ox", 9.5), (" is", 0.5), ("  ", 4.0), ("\n\n", 10.0)],
        NATS,
        ["", "a\nb", "c", "", ""],
    )
    spans = [attributes for tag, attributes in Document(block).tags if tag == "span"][:4]
    assert spans == [
        {"class": "p9", "title": "a\nb"},
        {"title": "c"},
        {"class": "p4"},
        {"class": "p10 break"},
    ]
    assert '>The <span class="p9" title="a\nb">ox</span> <span' in block
    assert "surprisal in nats 0" in Document(block).all and "10 and more" in block


def test_a_signed_scale_has_both_sides() -> None:
    block = page.heat_map([("a", -0.5), ("b", 0.5)], Scale("attribution", "", 0.5, signed=True), ["", ""])
    assert '<span class="m10">a</span><span class="p10">b</span>' in block
    assert "attribution −0.5" in Document(block).all
    styles = page.page("x", [block])
    classes = {a["class"] for tag, a in Document(block).tags if tag in ("i", "span") and a.get("class")}
    assert len(classes) == 20
    assert all(styles.count(f".{name}{{") == 2 for name in classes)  # light and dark


def test_the_note_of_a_token() -> None:
    told = page.note(
        [
            {
                "token": " ox", "start": 3, "end": 6, "log_probability": -9.25, "rank": 812, "entropy": None,
                "top": [{"token": "\n", "log_probability": -0.5}],
            },
            {"word": "ox", "log_likelihood": -1.5, "tokens": 2},
        ]
    )  # fmt: skip
    assert told == "' ox'\nlog-probability -9.25\nrank 812\n     -0.5  '\\n'\n'ox'\nlog-likelihood -1.5"


def test_figures_and_tables() -> None:
    values = {
        "tokens": 3,
        "labels": {"a": 1 / 3},
        "bos": True,
        "none": None,
        "bad": float("nan"),
        "list": [{"x": 1}],
    }
    block = page.figures(values)
    rows = re.findall(
        r"<tr><th scope=\"row\">(.*?)</th><td(?: class=\"number\"| dir=\"auto\")>(.*?)</td></tr>", block
    )
    assert rows == [("tokens", "3"), ("labels.a", "0.333333"), ("bos", "true"), ("none", "–"), ("bad", "–")]
    assert page.table(["text", "n"], [["a", None], ["b", 2.0]]) == (
        '<div class="wide"><table><thead><tr><th scope="col">text</th><th scope="col" class="number">n</th></tr>'
        '</thead><tbody><tr><td dir="auto">a</td><td class="number">–</td></tr>'
        '<tr><td dir="auto">b</td><td class="number">2</td></tr></tbody></table></div>'
    )


def test_a_megabyte_of_text() -> None:
    line = [("word", 3.0), (" and", 0.1), (" more", 6.0), (".\n", 2.0)]
    count = (1 << 20) // 15
    start = time.process_time()
    source = page.page("long", [page.heat_map(line * count, NATS, ["rank 1"] * 4 * count)])
    assert time.process_time() - start < 20
    parts = source.split('<div dir="auto">')[1:]
    assert 200 < len(parts) < 300  # so that a browser lays out what is seen
    assert {re.sub("<.*?>", "", part) for part in parts[:-1]} == {"word and more.\n" * 267}


def test_a_text_without_line_ends_is_parted_too() -> None:
    block = page.heat_map([("word ", 3.0)] * 10_000, NATS, [""] * 10_000)
    assert block.count('<div dir="auto">') == 4
    assert Document(block).text == "word " * 10_000


def test_a_reader_with_a_narrow_window_sees_all(tmp_path: Path) -> None:
    signed = Scale("integrated gradients", "", 3.1, signed=True)
    names = [f"token{number}" for number in range(40)]
    row: list[Any] = [0.5] * 40
    blocks = [
        page.paragraph("all weights, from bert at " + "0" * 64),
        page.heat_map([("fine", 1.0), ("bad", -2.0)], signed, ["", "bad -2"]),
        page.grid(Grid(["target"], names, [row], [names], signed)),
        page.figures({"sha256": "0" * 64}),
    ]
    path = tmp_path / "page.html"
    path.write_text(page.page("Why", blocks), encoding="utf-8")
    with opened(path, tmp_path / "browser", width=360, dark=True) as seen:
        assert seen.value("document.documentElement.scrollWidth") == 360
        name = seen.value("document.querySelector('.grid tbody th').getBoundingClientRect().x")
        seen.point(".grid td:last-child")
        assert seen.value("document.getElementById('note').innerText") == "token39"
        assert seen.value("document.querySelector('.grid tbody th').getBoundingClientRect().x") == name
        dark = seen.value("getComputedStyle(document.body).backgroundColor")
        seen.look(360)
        assert seen.value("getComputedStyle(document.body).backgroundColor") != dark
        assert seen.complaints == []
