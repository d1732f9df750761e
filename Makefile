# House checks. Run them in an environment that holds `pip install -e ".[dev]"`.
# `make check` is what has to be green; `make fix` mends what a program can mend.

.PHONY: check quality format lint types layers current test fast fix docs completions generate audit

check: quality test

# Everything but the tests.
quality: format lint types layers current

format:
	ruff format --check --output-format concise .

lint:
	ruff check --output-format concise .

types:
	mypy

layers:
	lint-imports --no-logo

# The generated files say what the program says.
current:
	python docs/generate.py --check

test:
	pytest

fast:
	pytest -m "not slow"

fix:
	ruff check --fix .
	ruff format .

# Both come from one program: a change of an option shows in the reference and in the shells.
docs completions generate:
	python docs/generate.py

audit:
	pip-audit --skip-editable
