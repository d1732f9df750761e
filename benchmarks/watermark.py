"""How surely a watermark is found in texts of the default model, and how seldom in texts without one.

Texts of 200 tokens are written with and without a key; each is read again, whole and with a fifth of its
words replaced by words of other texts. False positives are counted over paragraphs of real prose, at the p of a verdict
and, since these are few, at one in a hundred too. It took 3.5 minutes on two cores.
"""

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from benchmarks.runner import Ratio, Run
from benchmarks.score import prose

KEY = "benchmark"
TOKENS = 200
EDITED = 0.2  # share of the words that is replaced
TOPICS = ("a river", "old houses", "bread", "the moon", "a long journey", "bees", "a school", "winter")


def run(quick: bool) -> Iterator[list[Ratio]]:
    """One line a kind of text, and two shares: watermarked texts that are missed, and others that are not."""
    count, humans = (8, 1000) if quick else (24, 2000)
    paragraphs = [text for text in prose(20_000) if len(text) > 80][:humans]
    words = " ".join(paragraphs).split()
    marked, plain = _written(count, "--watermark", KEY), _written(count)
    kinds = {
        "watermarked": marked,
        "watermarked, 20 % of words replaced": [_edited(text, words, n) for n, text in enumerate(marked)],
        "watermarked, read with another key": marked,
        "by the model, no watermark": plain,
        "real prose": paragraphs,
    }
    shares = {}
    for name, texts in kinds.items():
        found = _read(texts, "other" if "another" in name else KEY)
        hits = sum(line["watermarked"] for line in found)
        shares[name] = hits / len(found)
        middle = {field: median(line[field] for line in found) for field in ("z", "green_fraction", "tokens")}
        chance = sum(line["p_value"] < 0.01 for line in found)
        print(
            f"{name}: {hits} of {len(found)}, p under 0.01: {chance}; median z {middle['z']:.1f}, "
            f"green {middle['green_fraction']:.2f}, {middle['tokens']:.0f} pairs; "
            f"lowest p {min(line['p_value'] for line in found):.1g}",
            flush=True,
        )
    missed, false = 1 - shares["watermarked"], shares["real prose"]
    yield [
        _share("watermarked texts that are missed", missed, 0.1),
        _share("real prose taken for it", false, 0.001),
    ]


def _share(name: str, value: float, target: float) -> Ratio:
    return Ratio(name, [Run(value, 0, "")], [Run(1.0, 0, "")], target)


def _written(count: int, *options: str) -> list[str]:
    prompts = [{"prompt": f"Write about {TOPICS[n % len(TOPICS)]}, part {n + 1}."} for n in range(count)]
    length = ("-n", str(TOKENS), "--min-new-tokens", str(TOKENS))
    lines = _textgen(["generate", "--chat", "--jsonl", *length, *options], prompts)
    return [str(line["text"]) for line in lines]


def _read(texts: Sequence[str], key: str) -> list[dict[str, Any]]:
    return _textgen(["score", "--jsonl", "--watermark", key], [{"text": text} for text in texts])


def _edited(text: str, words: Sequence[str], seed: int) -> str:
    draw = random.Random(seed)
    own = text.split(" ")
    for place in draw.sample(range(len(own)), round(len(own) * EDITED)):
        own[place] = draw.choice(words)
    return " ".join(own)


def _textgen(arguments: Sequence[str], records: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "textgen_cli", *arguments]
    given = "".join(json.dumps(record) + "\n" for record in records)
    done = subprocess.run(command, input=given, capture_output=True, encoding="utf-8", check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]
