"""The interactive conversation: reads lines of a person, shows answers as they come, obeys /commands.

It owns the terminal while the conversation lasts; what an answer is stands in generate/talk.py.
"""

import io
import shlex
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from textgen_cli.cli import console, signals
from textgen_cli.cli.console import Output, Reporter
from textgen_cli.errors import TextgenError, UsageError
from textgen_cli.generate.request import Chunk
from textgen_cli.generate.talk import Conversation
from textgen_cli.text.sanitize import visible

HELP = """\
/system [TEXT]      set the system message, or take it away
/reset              forget what was said
/retry              answer the last message anew, with the next seed
/save FILE          write the conversation as one JSONL record
/load FILE          go on with a saved conversation
/set NAME VALUE     change a decoding setting, such as /set temperature 0.5; VALUE none takes it back
/help               show this
A line that ends with \\ goes on in the next one; so does all between two lines of \"\"\".
A blank before a / makes it part of a message. Ctrl-C stops an answer, Ctrl-D leaves."""


def converse(conversation: Conversation, report: Reporter) -> None:
    """Talk until the person leaves."""
    conversation.open()  # now, while the bar can say so
    report.hide()
    _edit_lines()
    screen = Console()
    # A terminal in an unknown locale may send any bytes.
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    screen.print("/help shows what can be said besides; Ctrl-D leaves.", style="dim", highlight=False)
    with signals.interruptible():
        while _turn(conversation, screen):
            pass


def _edit_lines() -> None:
    """Arrow keys and the lines of this session, where Python was built with them."""
    try:
        import readline  # noqa: F401 - importing it is what changes input()
    except ImportError:
        pass


def _turn(conversation: Conversation, screen: Console) -> bool:
    """One thing said and done; False where the person leaves. An error is told and the conversation goes on."""
    try:
        said = _read()
        if said is None:
            return False
        if said.strip():
            _obey(conversation, screen, said)
    except TextgenError as error:
        console.tell_error(error)
    except KeyboardInterrupt:
        screen.print()
    return True


def _read() -> str | None:
    """What the person says next; None where they leave."""
    lines: list[str] = []
    fenced = False
    while True:
        try:
            line = input("… " if lines or fenced else "> ")
        except EOFError:
            print()  # noqa: T201 - the shell's prompt shall not stand behind ours
            return None
        line = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        if line.strip() == '"""':
            if fenced:
                return "\n".join(lines)
            fenced = True
        elif not fenced and line.endswith("\\"):
            lines.append(line[:-1])
        else:
            lines.append(line)
            if not fenced:
                return "\n".join(lines)


def _obey(conversation: Conversation, screen: Console, said: str) -> None:
    if not said.startswith("/") or "\n" in said:
        _show(screen, conversation.ask(said), conversation)
        return
    command, *rest = said.split(None, 1)
    if command not in COMMANDS:
        hint = "/help shows them all; a blank before the / makes it a message"
        raise UsageError("E-CHAT", command, "is no command", hint=hint)
    COMMANDS[command](conversation, screen, rest[0].strip() if rest else "")


def _show(screen: Console, chunks: Generator[Chunk], conversation: Conversation) -> None:
    """Show an answer; Ctrl-C ends the answer, not the conversation."""
    with closing(chunks) as open_chunks:
        show = _show_plainly if screen.is_dumb_terminal else _show_live
        if not show(screen, open_chunks):
            screen.print("(stopped)", style="dim", highlight=False)
    if conversation.dropped:
        told = f"(the {conversation.dropped} oldest messages no longer fit)"
        screen.print(told, style="dim", highlight=False)


def _show_plainly(screen: Console, chunks: Iterator[Chunk]) -> bool:
    """Text as it comes and nothing else, for terminals that cannot take it back; whether it is whole."""
    output = Output()
    try:
        for chunk in chunks:
            output.write(chunk.text)
    except KeyboardInterrupt:
        return False
    finally:
        output.write("\n")
    return True


def _show_live(screen: Console, chunks: Iterator[Chunk]) -> bool:
    """Text as it grows, then the whole as Markdown; whether it is whole."""
    text = ""
    try:
        with Live(console=screen, transient=True, redirect_stdout=False, redirect_stderr=False) as live:
            for chunk in chunks:
                text += chunk.text
                live.update(_newest(text, screen))
    except KeyboardInterrupt:
        screen.print(Text(visible(text)))
        return False
    screen.print(_Shown(text))
    return True


def _newest(text: str, screen: Console) -> Text:
    """The lines that fit on the screen: what has left it could not be taken back."""
    width, height = screen.size
    lines = Text(visible(text[-width * height :])).wrap(screen, width)
    return Text("\n").join(lines[-max(height - 2, 1) :])


class _Shown:
    """A text as Markdown, sanitised once more when it is drawn: `&#x202e;` becomes a character only there."""

    def __init__(self, text: str) -> None:
        # Links are written out: a name must not hide where it leads.
        self._markdown = Markdown(visible(text), hyperlinks=False)

    def __rich_console__(self, screen: Console, options: ConsoleOptions) -> RenderResult:
        for segment in screen.render(self._markdown, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def _system(conversation: Conversation, screen: Console, rest: str) -> None:
    conversation.system = rest or None


def _reset(conversation: Conversation, screen: Console, rest: str) -> None:
    conversation.reset()


def _retry(conversation: Conversation, screen: Console, rest: str) -> None:
    _show(screen, conversation.retry(), conversation)


def _save(conversation: Conversation, screen: Console, rest: str) -> None:
    conversation.save(_path("/save", rest))


def _load(conversation: Conversation, screen: Console, rest: str) -> None:
    conversation.load(_path("/load", rest))


def _set(conversation: Conversation, screen: Console, rest: str) -> None:
    name, _, value = rest.partition(" ")
    if not value.strip():
        raise UsageError("E-CHAT", "/set", "takes a name and a value")
    conversation.set(name, value.strip())


def _help(conversation: Conversation, screen: Console, rest: str) -> None:
    screen.print(HELP, markup=False, highlight=False)


def _path(command: str, rest: str) -> Path:
    try:
        [name] = shlex.split(rest)
    except ValueError:
        raise UsageError("E-CHAT", command, "takes the name of a file") from None
    return Path(name).expanduser()


COMMANDS: dict[str, Callable[[Conversation, Console, str], None]] = {
    "/system": _system,
    "/reset": _reset,
    "/retry": _retry,
    "/save": _save,
    "/load": _load,
    "/set": _set,
    "/help": _help,
}
