"""A progress bar on request, by rich or tqdm, whichever is installed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from bilevel.errors import UnsupportedError


@contextmanager
def progress_bar(total: int, *, show: bool) -> Iterator[Callable[[str], None]]:
    """A bar of `total` steps on standard error, or nothing.

    Args:
        total: number of steps.
        show: whether there is a bar.

    Yields:
        What is called after each step with a text to show.

    Raises:
        UnsupportedError: if a bar is asked for and neither package is installed.
    """
    if not show:
        yield lambda _text: None
    elif find_spec("rich"):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("{task.description}")
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total)
            yield lambda text: bar.update(task, advance=1, description=text)
    elif find_spec("tqdm"):
        from tqdm import tqdm

        with tqdm(total=total) as bar:

            def advance(text: str) -> None:
                bar.set_postfix_str(text, refresh=False)
                bar.update()

            yield advance
    else:
        raise UnsupportedError(
            "progress=True needs rich or tqdm, and neither is installed: pip install rich, or "
            "pass a callback."
        )
