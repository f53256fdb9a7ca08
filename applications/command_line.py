"""What the command lines of the applications share."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bilevel.errors import BilevelError

Report = Callable[[str, float], None]  # (stage, share of it done)
Seed = Annotated[int, typer.Option(help="Of everything that is random.")]
Device = Annotated[str, typer.Option(help="Where to train, cpu or cuda.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 leaves the choice to torch.")]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Errors that a user can mend are one line and exit code 2; Ctrl-C is exit code 130."""

    @wraps(command)
    def run(**arguments: object) -> None:
        try:
            command(**arguments)
        except BilevelError as error:
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            sys.stderr.write("interrupted: the files that were written are complete.\n")
            raise typer.Exit(130) from None

    return run


def use_threads(threads: int) -> None:
    """Let torch use that many threads; 0 leaves it to torch."""
    if threads > 0:
        torch.set_num_threads(threads)


@contextmanager
def progress_bars(console: Console) -> Iterator[Report]:
    """A progress bar a stage, on the screen while it is worked on."""
    columns: list[Any] = [
        TextColumn("{task.description:28}"),
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
                tasks[stage] = progress.add_task(stage, total=1.0)
            progress.update(tasks[stage], completed=share)

        yield report
