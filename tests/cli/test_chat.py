"""The conversation at a terminal: a real pseudo-terminal, a small real model, and the batch as the reference."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pexpect
import pytest
from parts.endpoint import DONE, Call, Stub, event, events, refuse, reply, whole
from parts.models import CHAT_TEMPLATE
from parts.program import Program
from parts.shell import Seat

PROMPT = "\r\n> "
GREEDY = ("--greedy", "-n", "12")
LOCAL = ("--dtype", "float32", "--device", "cpu")
Talk = Callable[..., "Person"]
Batch = Callable[..., list[str]]

pytestmark = pytest.mark.slow  # each talks with a real program on a terminal


class Person:
    """Somebody at a terminal."""

    def __init__(self, program: Program, folder: Path, *args: str, **variables: str) -> None:
        self.folder = folder
        self.seat = Seat(program, folder, args, variables)
        self.screen = self.seat.screen
        self.screen.expect_exact(PROMPT)

    def say(self, *lines: str) -> str:
        """Say this, and return what the terminal showed until the next prompt."""
        for line in lines:
            self.screen.sendline(line)
        # Each line is echoed; what follows the last one is the answer.
        self.screen.expect_exact(PROMPT)
        return str(self.screen.before)

    def interrupt(self) -> None:
        self.screen.send("\x03")

    def history(self) -> list[dict[str, Any]]:
        self.say("/save now.jsonl")
        messages: list[dict[str, Any]] = json.loads((self.folder / "now.jsonl").read_text())["messages"]
        return messages

    def leave(self) -> int:
        self.screen.send("\x04")
        return self.seat.ended()


@pytest.fixture(scope="module")
def folder(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small chat model with the tokens that a long answer needs."""
    copy = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(small_model("llama", CHAT_TEMPLATE), copy)
    return copy


@pytest.fixture(scope="module")
def long_folder(folder: Path) -> Path:
    """The same model for answers that last until they are stopped."""
    copy = folder.parent / "long"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    return copy


@pytest.fixture(name="talk")
def _talk(forked: Program, folder: Path, tmp_path: Path) -> Iterator[Talk]:
    inputrc = tmp_path / "inputrc"
    inputrc.write_text("set enable-bracketed-paste off\n")
    people = []

    def talk(*args: str, model: Path | None = folder, **more: str) -> Person:
        local = [] if model is None else [*LOCAL, "-m", str(model)]
        known = {"INPUTRC": str(inputrc), "HOME": str(tmp_path)}
        people.append(Person(forked, tmp_path, "generate", "--chat", *local, *args, **known | more))
        return people[-1]

    yield talk
    for person in people:
        person.seat.close()


@pytest.fixture(name="batch")
def _batch(forked: Program, folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The texts that piped records with these messages give."""

    def batch(conversations: list[Any], *args: str) -> list[str]:
        records = "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)
        argv = ("generate", "--jsonl", "-m", str(folder), *LOCAL, *args)
        done = forked(tmp_path, *argv, stdin=records.encode())
        assert (done.returncode, done.stderr) == (0, b"")
        return [json.loads(line)["text"] for line in done.stdout.splitlines()]

    return batch


def test_answers_are_those_of_piped_records(talk: Talk, batch: Batch) -> None:
    person = talk("--system", "Be brief.", *GREEDY)
    for said in ("hello", "what is a fox", "and a dog?"):
        assert "no longer fit" not in person.say(said)
    history = person.history()
    assert [m["role"] for m in history] == ["system", *["user", "assistant"] * 3]
    asked = [history[:end] for end in range(2, len(history), 2)]
    assert [m["content"] for m in history[2::2]] == batch(asked, *GREEDY)

    # Now the context of 128 tokens is full: the oldest turns go, and the person is told.
    shown = person.say("and now for something completely different, as they say")
    dropped = int(re.search(r"\(the (\d+) oldest messages no longer fit\)", shown)[1])  # type: ignore[index]
    assert dropped >= 2 and dropped % 2 == 0
    history = person.history()
    seen = [history[0], *history[1 + dropped : -1]]
    assert seen[1]["role"] == "user"
    assert [history[-1]["content"]] == batch([seen], *GREEDY)
    assert person.leave() == 0


def test_commands(talk: Talk, batch: Batch) -> None:
    person = talk("-n", "10", "--seed", "5")
    person.say("tell me more")
    first = person.history()
    assert [first[1]["content"]] == batch([first[:1]], "-n", "10", "--seed", "5")

    person.say("/retry")
    second = person.history()
    assert len(second) == 2
    assert [second[1]["content"]] == batch([first[:1]], "-n", "10", "--seed", "6")
    assert second != first

    person.say("/system Be brief.")
    assert person.history() == [{"role": "system", "content": "Be brief."}, *second]
    person.say("/reset")
    assert person.history() == [{"role": "system", "content": "Be brief."}]
    person.say("/system")
    assert "save FILE" in person.say("/help")

    (person.folder / "old talk.jsonl").write_text(json.dumps({"messages": second}) + "\n")
    person.say('/load "old talk.jsonl"')
    assert person.history() == second
    person.say("/set greedy true")
    person.say("/set max-new-tokens 4")
    person.say("again")
    after = person.history()
    assert [after[-1]["content"]] == batch([after[:-1]], "--greedy", "-n", "4")
    assert person.leave() == 0


WRONG = [
    ("/nonsense", "[E-CHAT] /nonsense: is no command"),
    ("/retry", "[E-CHAT] /retry: nothing has been asked yet"),
    ("/set", "[E-CHAT] /set: takes a name and a value"),
    ("/set temperature", "[E-CHAT] /set: takes a name and a value"),
    ("/set heat 3", "[E-CHAT] /set heat: is no decoding setting"),
    ("/set num_return_sequences 3", "is no decoding setting"),
    ("/set temperature hot", "[E-CHAT] /set temperature: is a number, not 'hot'"),
    ("/set top_k 1.5", "[E-CHAT] /set top_k: is a whole number, not '1.5'"),
    ("/set greedy perhaps", "[E-CHAT] /set greedy: is true or false"),
    ("/set temperature -1", "[E-RANGE] --temperature: must be >= 0"),
    ("/set temperature nan", "[E-RANGE] --temperature: must be >= 0"),
    ("/set seed many", "[E-RANGE] --seed: must be 'random'"),
    ("/set bad_words missing.txt", "missing.txt"),
    ("/save", "[E-CHAT] /save: takes the name of a file"),
    ("/save a b", "[E-CHAT] /save: takes the name of a file"),
    ("/save 'a", "[E-CHAT] /save: takes the name of a file"),
    ("/save no/such/folder", "[E-WRITE] no/such/folder: no such file or directory"),
    ("/load missing", "[E-READ] missing: no such file or directory"),
    ("/load inputrc", "[E-INPUT] inputrc: is no JSON record"),
    ("/load empty.json", "[E-FIELD] messages: must be a list"),
    ("word " * 200, "[E-CONTEXT] prompt: "),
]


def test_a_mistake_is_told_and_the_conversation_goes_on(talk: Talk) -> None:
    person = talk(*GREEDY)
    (person.folder / "empty.json").write_text("{}")
    for said, told in WRONG:
        shown = re.sub(r"\s+", " ", person.say(said))
        assert told in shown, (said, shown)
    person.say("/set seed random")
    person.say("hello")
    assert [m["role"] for m in person.history()] == ["user", "assistant"]
    assert person.leave() == 0


def test_an_unsafe_message_or_answer_leaves_no_trace(talk: Talk, batch: Batch, tmp_path: Path) -> None:
    [answer] = batch([[{"role": "user", "content": "hello"}]], *GREEDY)
    (tmp_path / "list").write_text(f"secret\nre:{re.escape(answer.split()[0])}\n")
    person = talk(*GREEDY, "--safety", "list", "--on-unsafe", "drop")
    shown = person.say("a secret")
    assert "[E-UNSAFE] prompt: matches list:1" in shown
    shown = person.say("hello")
    assert "[E-UNSAFE] text: matches list:2" in shown
    assert answer.split()[0] not in shown
    assert person.history() == []
    assert person.leave() == 0


def test_several_lines_are_one_message(talk: Talk) -> None:
    person = talk(*GREEDY)
    person.say("one\\", "two")
    person.say('"""', "/first", "", "second\\", '"""')
    person.say(" /usr is a folder")
    said = [m["content"] for m in person.history() if m["role"] == "user"]
    assert said == ["one\ntwo", "/first\n\nsecond\\", " /usr is a folder"]
    pytest.importorskip("readline")
    person.say("\x1b[A\x1b[A, too")  # the line before the last
    assert person.history()[-2]["content"] == " /usr is a folder, too"
    person.screen.sendline("half\\")
    person.screen.expect_exact("… ")
    person.interrupt()  # takes the half message back
    person.screen.expect_exact(PROMPT)
    assert len(person.history()) == 8
    assert person.leave() == 0


HOSTILE = "**bold** \x1b]52;c;eA==\x07 &#x202e;x [name](http://example.org/y) [red]z[/red]"


SLOW_COLOUR = pytest.param({"NO_COLOR": "1"}, marks=pytest.mark.slow)


@pytest.mark.parametrize("term", [{}, SLOW_COLOUR, {"TERM": "dumb"}], ids=str)
def test_what_is_shown_of_an_answer(talk: Talk, term: dict[str, str]) -> None:
    """The grammar makes the model say what a hostile one would."""
    person = talk("--choices", HOSTILE, "-n", "100", **term)
    shown = person.say("go on")
    assert person.history()[1]["content"] == HOSTILE
    assert "\x1b]" not in shown and "\x07" not in shown and "\u202e" not in shown
    assert "\\x1B]52;c;eA==\\x07" in shown and "[red]z[/red]" in shown
    if term.get("TERM") == "dumb":
        assert "\x1b" not in shown
        assert "**bold**" in shown
    else:
        assert re.search(r"\x1b\[1mbold\x1b\[0m", shown)
        assert "\\u{202E}x" in shown
        assert "http://example.org/y" in shown
        assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)) != ("NO_COLOR" in term)
    assert person.leave() == 0


@pytest.mark.parametrize("term", ["xterm", pytest.param("dumb", marks=pytest.mark.slow)])
def test_ctrl_c_stops_the_answer_only(talk: Talk, long_folder: Path, term: str) -> None:
    person = talk("-n", "20000", "--min-new-tokens", "20000", model=long_folder, TERM=term)
    for number in (1, 2):
        person.screen.sendline("go on for ever")
        person.screen.expect(r"ever\r\n(.|\r|\n){60,}")  # some of the answer has come
        person.interrupt()
        person.screen.expect_exact("(stopped)")
        person.screen.expect_exact(PROMPT)
        history = person.history()
        assert [m["role"] for m in history] == ["user", "assistant"] * number
        assert history[-1]["content"]
    person.interrupt()  # at the prompt nothing is stopped
    person.screen.expect_exact(PROMPT)
    assert person.leave() == 0


@pytest.mark.parametrize("busy", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sigterm_ends_it(talk: Talk, long_folder: Path, busy: bool) -> None:
    person = talk("-n", "20000", "--min-new-tokens", "20000", model=long_folder)
    if busy:
        person.screen.sendline("go on for ever")
        person.screen.expect(r"ever\r\n(.|\r|\n){60,}")
    os.kill(person.seat.started.pid, signal.SIGTERM)
    assert person.seat.ended() == -signal.SIGTERM
    assert "Traceback" not in person.screen.before
    if busy:
        assert "\x1b[?25h" in person.screen.before  # the cursor is back


def test_no_conversation_without_a_terminal(program: list[str], env: dict[str, str]) -> None:
    master, slave = pty.openpty()
    for args in (["--chat"], ["--chat", "--no-stdin"], ["--task", "chat"]):
        done = subprocess.run(
            [*program, "generate", *args], env=env, stdin=slave, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 2 and done.stdout == b""
        assert done.stderr.startswith(b"textgen: error: [E-USAGE] textgen generate: no prompt\n")
    os.close(slave)
    os.close(master)


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (("--num-return-sequences", "2"), "E-CONFLICT"),
        (("--truncate", "left"), "E-CONFLICT"),
        (("--engine", "compiled"), "E-ENGINE"),
        ((), "E-TEMPLATE"),
    ],
)
def test_what_cannot_become_a_conversation(
    forked: Program, folder: Path, small_model: Any, tmp_path: Path, args: tuple[str, ...], name: str
) -> None:
    model = folder if args else small_model("gpt2")
    seat = Seat(forked, tmp_path, ["generate", "--chat", "-m", str(model), *args])
    assert (seat.ended(), name in seat.screen.before) == (2 if args else 5, True)


# --- through a server


def test_a_conversation_with_a_server(talk: Talk) -> None:
    """It streams, takes what the protocol has, and tells of what it has not."""
    finished = threading.Event()

    def slowly(handler: BaseHTTPRequestHandler, call: Call) -> None:
        events(event("Hello"), 2.0, event(" there", "stop"), DONE)(handler, call)
        finished.set()

    steps = [slowly, whole("**two**"), whole("three"), whole("four")]
    with Stub(steps, models=reply(200, '{"data": [{"id": "m", "owned_by": "me"}]}')) as stub:
        person = talk("--endpoint", stub.url, "-m", "m", "--system", "Be brief.", model=None)
        person.screen.sendline("one")
        person.screen.expect_exact("Hello")
        assert not finished.is_set()
        person.screen.expect_exact(PROMPT)
        assert "Hello there" in person.screen.before
        said = [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"},
            {"role": "assistant", "content": "Hello there"},
        ]  # fmt: skip
        assert person.history() == said
        assert stub.calls[-1].body["messages"] == said[:2]

        for wrong, told in (
            ("/set num_beams 4", "[E-ENDPOINT-OPTION] --num-beams: cannot be sent"),
            ("/set top_k 5", "[E-ENDPOINT-OPTION] --top-k: "),
            ("/set temperature -1", "[E-RANGE] --temperature: must be >= 0"),
        ):
            assert told in person.say(wrong)
        person.say("/set temperature 0.25")
        person.say("/set max-new-tokens 9")
        assert re.search(r"\x1b\[1mtwo\x1b\[0m", person.say("two"))  # as Markdown
        body = stub.calls[-1].body
        assert (body["temperature"], body["max_tokens"], "top_k" in body) == (0.25, 9, False)
        assert body["messages"] == [*said, {"role": "user", "content": "two"}]
        first = body["seed"]

        person.say("/retry")
        body = stub.calls[-1].body
        assert body["seed"] != first
        assert body["messages"][-1] == {"role": "user", "content": "two"}
        person.say("/set greedy true")
        person.say("/reset")
        person.say("again")
        body = stub.calls[-1].body
        assert (body["temperature"], "seed" in body, len(body["messages"])) == (0, False, 2)
        assert person.leave() == 0


def test_a_conversation_with_a_server_needs_no_torch(program: list[str], env: dict[str, str]) -> None:
    with Stub([whole("Hello")], models=reply(200, '{"data": [{"id": "m"}]}')) as stub:
        argv = ["generate", "--chat", "--endpoint", stub.url, "-m", "m"]
        child = pexpect.spawn(program[0], argv, env={"TERM": "xterm"} | env, timeout=60, encoding="utf-8")
        child.expect_exact(PROMPT)
        child.sendline("one")
        child.expect_exact("Hello")
        maps = Path(f"/proc/{child.pid}/maps").read_text()
        assert "python" in maps and "torch" not in maps
        child.expect_exact(PROMPT)
        child.sendeof()
        child.expect(pexpect.EOF)
        child.close()
    assert child.exitstatus == 0


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_ctrl_c_stops_the_servers_answer(talk: Talk, term: str) -> None:
    for_ever: list[bytes | float] = [event("on and "), 0.05]
    with Stub([events(*for_ever * 2000), events(60.0), whole("fine")]) as stub:
        person = talk("--endpoint", stub.url, "-m", "m", model=None, TERM=term)
        person.screen.sendline("go on")
        person.screen.expect(r"on and on and on")
        person.interrupt()
        person.screen.expect_exact("(stopped)")
        person.screen.expect_exact(PROMPT)
        assert stub.hung_up.wait(5)  # the server need not go on
        history = person.history()
        assert history[-1]["content"].startswith("on and on and on")
        person.screen.sendline("say nothing")
        while len(stub.calls) < 2:
            time.sleep(0.01)
        person.interrupt()  # while nothing has come yet: the message is taken back
        person.screen.expect_exact("(stopped)")
        person.screen.expect_exact(PROMPT)
        assert person.history() == history
        assert "fine" in person.say("and now")
        assert len(person.history()) == 4
        assert person.leave() == 0


def test_what_a_server_refuses_is_told_and_the_message_taken_back(talk: Talk) -> None:
    full = refuse(400, "too long for the context", code="context_length_exceeded")
    wrong = [
        (full, "[E-CONTEXT] http"),
        (refuse(401, "no such key"), "[E-ENDPOINT-KEY] http"),
        (refuse(404, "The model `m` does not exist", "model"), "[E-ENDPOINT-MODEL] m: "),
        (refuse(400, "n\x1b]52;c;x\x07"), "n\\x1b]52;c;x\\x07"),
        (refuse(429, "later", Retry_After="99999"), "asks to wait 99999 s"),
    ]
    with Stub(
        [*(step for step, _ in wrong), whole("one"), full, full, whole("two"), full, whole("three")]
    ) as stub:
        person = talk("--endpoint", stub.url, "-m", "m", model=None)
        for _, told in wrong:
            shown = re.sub(r"\s+", " ", person.say("hello"))
            assert told in shown, shown
            assert "\x1b]52" not in shown
        assert person.say("/retry").count("nothing has been asked yet") == 1
        person.say("first")
        assert "[E-CONTEXT]" in person.say("a long one")
        assert [m["content"] for m in person.history()] == ["first", "one"]
        assert "no longer fit" not in person.say("second")
        assert "(the 2 oldest messages no longer fit)" in person.say("third")
        assert [m["content"] for m in stub.calls[-1].body["messages"]] == ["second", "two", "third"]
        assert person.leave() == 0


def test_a_server_that_cannot_be_had(forked: Program, tmp_path: Path) -> None:
    for address, code, name in (("ftp://x", 2, "E-ENDPOINT"), ("http://10.0.0.1:1/v1", 6, "E-INSECURE-KEY")):
        argv = ["generate", "--chat", "--endpoint", address, "-m", "m"]
        seat = Seat(forked, tmp_path, argv, {"TEXTGEN_API_KEY": "k"})
        assert (seat.ended(), f"[{name}]" in seat.screen.before) == (code, True)
