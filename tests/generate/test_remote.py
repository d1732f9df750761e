"""The remote engine: order, closing, imports, and a real server."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from parts.endpoint import QUICK, Stub, ask, engine, event, events, final, prompts, refuse, text_of, whole

from textgen_cli.config import DecodingConfig
from textgen_cli.errors import ModelError, UsageError
from textgen_cli.generate.remote import RemoteEngine
from textgen_cli.generate.request import Completion, Request, derive_seed

# Several sequences and several records.


def test_sequences_of_a_record_are_one_call_with_n() -> None:
    chunks, stub = ask(whole("a", "b", "c"), requests=prompts("p", n=3))
    assert [(chunk.sequence, chunk.text) for chunk in chunks] == [(0, "a"), (1, "b"), (2, "c")]
    assert [call.body["n"] for call in stub.calls] == [3]
    assert all(
        chunk.final == Completion("stop", 5, None) for chunk in chunks
    )  # the server counts them together


def test_a_server_that_ignores_n_is_an_error_and_separate_calls_do_without() -> None:
    chunks, _ = ask(whole("a"), requests=prompts("p", "q", n=2))
    errors = [chunk.final.error for chunk in chunks if chunk.final]
    assert [error.name if error else None for error in errors] == ["E-ENDPOINT-IGNORED"] * 4
    chunks, stub = ask(whole("a"), requests=prompts("p", n=2), split_sequences=True, concurrency=1)
    assert [chunk.text for chunk in chunks] == ["a", "a"]
    assert [call.body["seed"] for call in stub.calls] == [derive_seed(0, 0, s) % 2**31 for s in (0, 1)]
    assert not any("n" in call.body for call in stub.calls)


def test_records_come_in_order_whatever_order_they_are_answered_in() -> None:
    def late_first(handler: Any, call: Any) -> None:
        time.sleep(0.2 if call.body["prompt"] == "r0" else 0.01)
        whole()(handler, call)

    names = [f"r{i}" for i in range(40)]
    chunks, stub = ask(late_first, requests=prompts(*names), concurrency=5)
    assert [(chunk.index, chunk.text) for chunk in chunks] == [
        (i, name[::-1]) for i, name in enumerate(names)
    ]
    assert stub.busiest == 5


@pytest.mark.slow
def test_waiting_for_a_turn_is_no_stall() -> None:
    def slow(handler: Any, call: Any) -> None:
        time.sleep(QUICK.answer / 2)
        whole()(handler, call)

    chunks, _ = ask(slow, requests=prompts(*["ab"] * 8), concurrency=2)
    assert [chunk.text for chunk in chunks] == ["ba"] * 8


def test_one_bad_record_leaves_the_others_alone() -> None:
    def picky(handler: Any, call: Any) -> None:
        step = (
            refuse(400, "This model's maximum context length is 8 tokens")
            if call.body["prompt"] == "long"
            else whole()
        )
        step(handler, call)

    chunks, _ = ask(picky, requests=prompts("ab", "long", "cd"))
    assert [chunk.text for chunk in chunks] == ["ba", "", "dc"]
    error = final(chunks[1:2]).error
    assert error is not None
    assert error.name == "E-CONTEXT"


# The process around it.


def test_closing_the_iterator_closes_the_connection() -> None:
    pieces: list[bytes | float] = [event("a"), 0.05] * 100
    with Stub([events(*pieces)]) as stub:
        stream = engine(stub).stream(prompts("abc"))
        next(stream)
        start = time.monotonic()
        assert isinstance(stream, Iterator)
        stream.close()  # type: ignore[attr-defined]
        assert time.monotonic() - start < 0.5
        assert stub.hung_up.wait(2)


PROGRAM = """
import sys
from textgen_cli.config import DecodingConfig
from textgen_cli.generate.remote import RemoteEngine
from textgen_cli.generate.request import Request
requests = [Request(i, 0, "abc", None, 0) for i in range(int(sys.argv[2]))]
for chunk in RemoteEngine(sys.argv[1], "m", DecodingConfig()).stream(requests):
    print(chunk.text, flush=True)
print(sorted({"torch", "transformers", "numpy", "typer", "rich"} & set(sys.modules)))
"""


def test_no_torch_is_imported() -> None:
    with Stub([whole("hello")]) as stub:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, stub.url, "2"], capture_output=True, text=True, check=True
        )
    assert done.stdout.split("\n") == ["hello", "hello", "[]", ""]
    assert done.stderr == ""


@pytest.mark.parametrize("count", ["1", "20"])
def test_an_interrupt_ends_it_at_once(count: str) -> None:
    kind = "text/event-stream" if count == "1" else "application/json"
    with Stub([events(event("a"), 30.0, kind=kind)]) as stub:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, stub.url, count], stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 20
        while not stub.calls and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=10)
        assert time.monotonic() - start < 1.5
    assert stderr.strip().endswith("KeyboardInterrupt")
    assert "never retrieved" not in stderr


# A real server.


@contextmanager
def transformers_serve(folder: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    serve = "from transformers.cli.transformers import main; main()"
    command = [
        sys.executable,
        "-c",
        serve,
        "serve",
        str(folder),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, (process.stderr or sys.stdin).read()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.communicate(timeout=30)


def greedy_text(folder: Path, prompt: str | list[dict[str, str]], n: int) -> str:
    """What plain transformers generates in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt")
    else:
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt", tokenize=True
        )
    out = model.generate(**ids, do_sample=False, max_new_tokens=n)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.slow
def test_the_text_of_a_real_server_is_that_of_plain_transformers(default_model: Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("openai")
    said = ({"role": "user", "content": "Name three colours."},)
    prompt = "The capital of France is"
    decoding = DecodingConfig(greedy=True, max_new_tokens=12)
    expected = [greedy_text(default_model, prompt, 12), greedy_text(default_model, list(said), 12)]
    requests = [Request(0, 0, prompt, None, 0), Request(1, 0, None, said, 0)]
    with transformers_serve(default_model) as url:

        def remote(decoding: DecodingConfig = decoding, **options: Any) -> RemoteEngine:
            return RemoteEngine(url, str(default_model), decoding, concurrency=2, **options)

        streamed = [list(remote().stream([request])) for request in requests]
        assert [text_of(chunks) for chunks in streamed] == expected
        assert all(len(chunks) > 3 for chunks in streamed)
        together = list(remote().stream(requests))
        assert [chunk.text for chunk in together] == expected
        for chunks in (*streamed, together):
            last = chunks[-1].final
            assert last is not None
            assert last.completion_tokens is not None
        # A stop string stays in this server's text and is cut here.
        stop = expected[0].split()[1]
        assert (
            text_of(list(remote(stop=[stop]).stream(requests[:1]))) == expected[0][: expected[0].index(stop)]
        )
        # Ignored or refused: told, never silent.
        assert final(list(remote(logprobs=1).stream(requests[:1]))).error is not None
        assert final(list(remote(json_schema={"type": "object"}).stream(requests[1:]))).finish_reason in (
            "error",
            "length",
        )
        pair = list(remote(DecodingConfig(max_new_tokens=2)).stream(prompts(prompt, n=2)))
        assert all(chunk.final and chunk.final.error for chunk in pair)
        with pytest.raises(UsageError, match="--top-k"):
            list(remote(DecodingConfig(top_k=4)).stream(requests[:1]))
        with pytest.raises(UsageError, match="--top-k"):
            list(remote(DecodingConfig(top_k=4), server="vllm").stream(requests[:1]))
        with pytest.raises(ModelError, match="E-ENDPOINT-MODEL"):
            list(RemoteEngine(url, "another", decoding).stream(requests[:1]))
