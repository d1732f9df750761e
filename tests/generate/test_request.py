"""Seeds stay the same for ever; a request holds one kind of text."""

import pytest

from textgen_cli.errors import InternalError
from textgen_cli.generate.request import Request, derive_seed


@pytest.mark.parametrize(
    ("parts", "seed"),
    [
        ((0, 0, 0), 6059358189120503749),
        ((0, 0, 1), 2498238232055108232),
        ((0, 1, 0), 1265074720719465983),
        ((1, 0, 0), 8036015875637296570),
        ((2**63 - 1, 999_999, 99), 3496424316090472964),
    ],
)
def test_seeds_stay_what_they_are(parts: tuple[int, int, int], seed: int) -> None:
    assert derive_seed(*parts) == seed


def test_seeds_of_a_large_job_differ() -> None:
    seeds = {derive_seed(0, index, sequence) for index in range(20_000) for sequence in range(5)}
    assert len(seeds) == 100_000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_digits_do_not_run_together() -> None:
    assert derive_seed(1, 11, 1) != derive_seed(11, 1, 1) != derive_seed(1, 1, 11)


@pytest.mark.parametrize(("prompt", "messages"), [(None, None), ("a", ({"role": "user", "content": "a"},))])
def test_a_request_is_a_prompt_or_a_conversation(
    prompt: str | None, messages: tuple[dict[str, str], ...] | None
) -> None:
    with pytest.raises(InternalError):
        Request(0, 0, prompt, messages, 0)
