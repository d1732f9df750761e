"""python -m benchmarks [NAME...] [--quick]: measures and prints tables; exit code 1 when a target is missed.

`results.json` beside this file holds the last figures of each benchmark, and what they were measured on.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import decode, explain, finetune, generate, growth, limits, runner, score, startup, watermark
from benchmarks.runner import Ratio

BENCHMARKS: dict[str, Callable[..., Iterator[list[Ratio]]]] = {
    "startup": startup.run,
    "generate": generate.run,
    "decode": decode.run,
    "score": score.run,
    "growth": growth.run,
    "limits": limits.run,
    "explain": explain.run,
    "watermark": watermark.run,
    "finetune": finetune.run,
}
WITH_ROWS = {"startup", "generate", "decode", "score", "growth", "limits", "finetune"}
RESULTS = Path(__file__).with_name("results.json")


def main() -> int:
    """Run the benchmarks that are named, or all; 0 when every target was met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; none: all of them"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds; for a look, not for a figure")
    parser.add_argument("--only", metavar="ROW", help="one row of one benchmark; finetune: or speed, trl")
    args = parser.parse_args()
    if unknown := set(args.names) - BENCHMARKS.keys():
        parser.error(f"no benchmark is called {min(unknown)}")
    if args.only and (len(args.names) != 1 or args.names[0] not in WITH_ROWS):
        parser.error(f"--only is for one of {', '.join(sorted(WITH_ROWS))}")
    machine = runner.machine()
    print(machine, end="\n\n", flush=True)
    met = True
    for name in args.names or BENCHMARKS:
        rows: list[dict[str, Any]] = []
        only = [args.only] if args.only else []
        for ratios in BENCHMARKS[name](args.quick, *only):
            print(runner.table(ratios), end="\n\n", flush=True)
            met = met and all(ratio.met for ratio in ratios)
            rows += [runner.fields(ratio) for ratio in ratios]
            _write(" ".join([name, *only]), {"machine": machine, "quick": args.quick, "rows": rows})
        print(runner.markdown(rows), end="\n\n", flush=True)
    return 0 if met else 1


def _write(name: str, found: dict[str, Any]) -> None:
    """Put one benchmark's figures beside the last ones of the others."""
    known = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, name: found}, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
