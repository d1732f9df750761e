"""Templates against str.format, and what they refuse."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textgen_cli.errors import InputError, UsageError
from textgen_cli.text.template import fill, template_fields

NAMES = st.sampled_from(["text", "to", "from", "größe", "a_b", "x1"])
PLAIN = st.text().map(lambda text: text.replace("{", "{{").replace("}", "}}"))


@settings(deadline=None)
@given(
    st.lists(st.one_of(PLAIN, NAMES.map("{{{}}}".format))), st.dictionaries(NAMES, st.text() | st.integers())
)
def test_fills_as_str_format_does(parts: list[str], fields: dict[str, Any]) -> None:
    template = "".join(parts)
    missing = [name for name in template_fields(template) if name not in fields]
    if not missing:
        assert fill(template, fields) == template.format(**fields)
        return
    with pytest.raises(InputError) as caught:
        fill(template, fields)
    assert (caught.value.name, caught.value.subject) == ("E-FIELD", missing[0])


@pytest.mark.parametrize(
    ("template", "fields", "expected"),
    [
        ("Translate to {to=French}: {text}", {"text": "a {b} {{c}}"}, "Translate to French: a {b} {{c}}"),
        ("{to=French}", {"to": "German"}, "German"),
        ("{to=}|", {}, "|"),
        ("{ text }", {"text": "spaces"}, "spaces"),
        ("{first-name} {n} {x}", {"first-name": "Ann", "n": 3, "x": 0.5}, "Ann 3 0.5"),
        ("{{{text}}}", {"text": "in braces"}, "{in braces}"),
        ("", {}, ""),
    ],
)
def test_fill(template: str, fields: dict[str, Any], expected: str) -> None:
    assert fill(template, fields) == expected


@pytest.mark.parametrize("value", [None, True, [1], {"a": 1}])
def test_only_text_and_numbers_are_put_in(value: Any) -> None:
    with pytest.raises(InputError, match=r"E-FIELD.*text or a number"):
        fill("{text=default}", {"text": value})


@pytest.mark.parametrize(
    ("template", "place"),
    [
        ("{", "line 1, column 1"),
        ("a }", "line 1, column 3"),
        ("one\n two {text", "line 2, column 6"),
        ("{}", "line 1, column 1"),
        ("{0}", "line 1, column 1"),
        ("{text.__class__}", "line 1, column 1"),
        ("{text[0]}", "line 1, column 1"),
        ("{text!r}", "line 1, column 1"),
        ("{text:>10000000000}", "line 1, column 1"),
        ("{text:{width}}", "line 1, column 1"),
        ("{{}", "line 1, column 3"),
    ],
)
def test_broken_templates_are_refused_with_their_place(template: str, place: str) -> None:
    for use in (template_fields, lambda text: fill(text, {"text": "x", "width": 1})):
        with pytest.raises(UsageError) as caught:
            use(template)
        assert caught.value.name == "E-TEMPLATE"
        assert caught.value.fact.startswith(place)


def test_template_fields_are_named_once_in_order() -> None:
    assert template_fields("{b} {a=x} {{c}} {b}") == ["b", "a"]


@settings(deadline=None)
@given(st.text(alphabet="{}ab=: \n"))
def test_any_string_is_filled_or_refused(template: str) -> None:
    try:
        names = template_fields(template)
    except UsageError:
        return
    filled = fill(template, dict.fromkeys(names, "v"))
    assert re.sub(r"\{\{|\}\}", "", filled).count("{") <= template.count("{")
