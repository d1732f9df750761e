"""python -m benchmarks NAME [--quick]: runs one benchmark; exit code 1 when a target is missed."""

import argparse
import sys
from collections.abc import Callable

from benchmarks import generate, runner, startup

BENCHMARKS: dict[str, Callable[[bool], bool]] = {
    "startup": startup.run,
    "generate": generate.run,
}


def main() -> int:
    """Run the benchmark named on the command line; 0 when every target was met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; for a look, not for a figure")
    args = parser.parse_args()
    print(runner.machine(), end="\n\n", flush=True)
    return 0 if BENCHMARKS[args.name](args.quick) else 1


if __name__ == "__main__":
    sys.exit(main())
