"""What the command lines of the applications share."""

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from applications.errors import InputError, needing
from applications.files import no_empty_folders
from applications.options import with_options
from applications.records import Report
from bilevel.errors import BilevelError

Seed = Annotated[int, typer.Option(help="Of everything that is random.")]
# Beyond that a library for threads may end the process.
Threads = Annotated[
    int, typer.Option(min=0, max=1024, help="CPU threads; 0 leaves the choice to torch.")
]


def shown(text: str) -> str:
    r"""A text as screens take it, whatever name of a file is in it.

    Args:
        text: may hold control characters, and bytes that are no text in the encoding of the system.

    Returns:
        The text; each of those is written as an escape such as ``\x1b``.
    """
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode()
        for one in text
    )


class _Console(Console):
    """A console that takes texts as they are: brackets and colons in names mean nothing."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **options)


console = _Console(markup=False, emoji=False)


def command_line(
    about: str, extra: str, commands: Mapping[str, Callable[..., None]]
) -> typer.Typer:
    """The command line of an application.

    Errors that a user can mend are one line and exit code 2, a missing package among them; Ctrl-C
    is exit code 130, SIGTERM 143.

    Args:
        about: what it is, for the help.
        extra: of `bilevel` that brings the packages it needs.
        commands: by name, as `options.with_options` takes them.

    Returns:
        The application of typer.
    """
    app = typer.Typer(
        add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=about
    )
    for name, function in commands.items():
        app.command(name)(_guarded(with_options(function), extra))
    return app


def _guarded(command: Callable[..., None], extra: str) -> Callable[..., None]:
    @wraps(command)
    def run(**arguments: object) -> None:
        try:
            _check_whole(arguments)
            with _ending(), no_empty_folders(), needing(extra), _warnings_in_a_line():
                command(**arguments)
        except (BilevelError, OSError, MemoryError) as error:
            raise _refused(str(error) or type(error).__name__) from None
        except RuntimeError as error:
            if not _is_full(error):
                raise
            raise _refused(f"there is not enough memory ({error}); take smaller sizes.") from None
        except KeyboardInterrupt:
            raise _interrupted(signal.SIGINT) from None
        except _Ended as error:
            raise _interrupted(error.number) from None

    return run


class _Ended(SystemExit):
    """Another program asked this one to end."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@contextmanager
def _ending() -> Iterator[None]:
    """SIGTERM and SIGHUP end what is inside as Ctrl-C does, so that no half of a file is left."""

    def end(number: int, _frame: object) -> None:
        raise _Ended(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(number: int) -> typer.Exit:
    """One line about a signal, and how the program ends."""
    sys.stderr.write("interrupted: the files that were written are complete.\n")
    return typer.Exit(128 + number)


def _refused(said: str) -> typer.Exit:
    """One line about an error that a user can mend, and how the program ends."""
    sys.stderr.write(f"error: {shown(' '.join(said.split()))}\n")
    return typer.Exit(2)


def _is_full(error: RuntimeError) -> bool:
    """Whether torch found no memory, or was asked for more than any machine has."""
    texts = "can't allocate memory", "not enough memory", "Storage size calculation overflowed"
    full = any(text in str(error) for text in texts)
    return full or isinstance(error, torch.OutOfMemoryError)


def _check_whole(arguments: Mapping[str, object]) -> None:
    """Refuse whole numbers that no generator and no tensor takes."""
    for name, value in arguments.items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} must lie between -2^63 and 2^63 - 1, got {value}.")


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Warnings meant for users as one line, like errors."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, UserWarning):
                sys.stderr.write(f"warning: {shown(' '.join(str(message).split()))}\n")
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        yield


def say(line: str) -> None:
    """Print one line as it is, whatever the width of the screen."""
    console.print(line, soft_wrap=True, highlight=False)


def use_threads(threads: int) -> None:
    """Let torch use that many threads; 0 leaves it to torch."""
    if threads > 0:
        torch.set_num_threads(threads)


@contextmanager
def progress_bars() -> Iterator[Report]:
    """A progress bar a stage, on the screen while it is worked on."""
    columns: list[Any] = [
        TextColumn("{task.description:28}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def report(stage: str, share: float) -> None:
            if stage not in tasks:
                for other in tasks.values():
                    progress.update(other, completed=1.0)
                tasks[stage] = progress.add_task(shown(stage), total=1.0)
            progress.update(tasks[stage], completed=share)

        yield report
