"""The command line `bilevel-toy task-weights|hyper-cleaning`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.table import Table

from applications.command_line import Threads, command_line, console, progress_bars, use_threads
from applications.files import make_folder, write_json
from applications.keeping import Kept, going_on
from applications.outputs import PICTURE, Output, claimed, results
from applications.records import Report, spread
from applications.toy.cleaning import Cleaning, CleaningResult, CleaningRun, CleaningSettings
from applications.toy.figures import draw_cleaning, draw_task_weights
from applications.toy.hyper_cleaning import run_hyper_cleaning
from applications.toy.task_results import Learned, Result, Run, Settings
from applications.toy.task_weights import run_task_weights

RESULTS = results("settings", records={"runs": ("seed", "accuracies")})
_EVERY = 5  # updates between two checkpoints
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the interrupted run of --out, if any.")
]
Folder = Annotated[Path, typer.Option(help="Folder for results.json and figure.png.")]


def task_weights(
    out: Folder, settings: Settings, resume: Resume = False, threads: Threads = 0
) -> None:
    """Learn which training tasks help which validation tasks, and compare what comes of it."""
    use_threads(threads)
    with _kept(out, settings, (Run, Learned), resume=resume) as kept:
        run = partial(run_task_weights, settings, kept=kept)
        _carry_out(out, run, draw_task_weights, _print)


def hyper_cleaning(
    out: Folder, settings: CleaningSettings, resume: Resume = False, threads: Threads = 0
) -> None:
    """Learn which training labels are wrong from clean validation data, and train without them."""
    use_threads(threads)
    with _kept(out, settings, (CleaningRun, Cleaning), resume=resume) as kept:
        run = partial(run_hyper_cleaning, settings, kept=kept)
        _carry_out(out, run, draw_cleaning, _print_cleaning)


app = command_line(
    "Classification with cross-entropy: weights learned by bilevel descent.",
    "toy",
    {"task-weights": task_weights, "hyper-cleaning": hyper_cleaning},
)

R = TypeVar("R", Result, CleaningResult)


@contextmanager
def _kept(
    out: Path, settings: Settings | CleaningSettings, records: tuple[type, ...], *, resume: bool
) -> Iterator[Kept]:
    """Where a run is kept until its results are written."""
    conditions = {name: repr(value) for name, value in vars(settings).items()}
    folder = make_folder(out) / "state"
    with (
        claimed(
            [Output(out / "results.json", RESULTS), Output(out / "figure.png", PICTURE)], folder=out
        ),
        going_on(folder, conditions, records, resume=resume, every=_EVERY) as kept,
    ):
        yield kept


def _carry_out(
    out: Path,
    run: Callable[[Report], R],
    draw: Callable[[Path, R], None],
    tell: Callable[[R], None],
) -> None:
    """Run an experiment, and leave its results in a folder and on the screen."""
    with progress_bars() as report:
        result = run(report)
    write_json(out / "results.json", result.as_json())
    draw(out / "figure.png", result)
    tell(result)
    console.print(f"Results  {out / 'results.json'}")
    console.print(f"Figure   {out / 'figure.png'}")


def _print_accuracies(result: Result | CleaningResult, what: str, digits: int) -> None:
    table = Table(title=f"Test accuracy, {result.data}, {what}")
    for name in ("trained on", "mean [%]", "spread"):
        table.add_column(name, justify="left" if name == "trained on" else "right")
    for way in result.runs[0].accuracies:
        found = 100 * result.accuracy(way)
        table.add_row(way, f"{float(found.mean()):.{digits}f}", f"{spread(found):.{digits}f}")
    console.print(table)


def _print_cleaning(result: CleaningResult) -> None:
    _print_accuracies(result, result.settings.model, 2)
    f1, mass = result.cleaning("f1"), result.cleaning("wrong_mass")
    seconds = sum(run.seconds for run in result.runs) / len(result.runs)
    console.print(
        f"Wrong labels found with F1 {float(f1.mean()):.3f}; {100 * float(mass.mean()):.1f} % of "
        f"the weight lies on them; {seconds:.0f} s of descent a seed"
    )


def _print(result: Result) -> None:
    _print_accuracies(result, f"mean over {len(result.validations)} tasks", 1)
    for form in ("vector", "matrix"):
        learned = [getattr(run, form) for run in result.runs]
        mass = torch.stack([one.related_mass for one in learned])
        seconds = sum(one.seconds for one in learned) / len(learned)
        console.print(
            f"Learned {form}: {100 * float(mass.mean()):.1f} % of the weight on related tasks, "
            f"at least {100 * float(mass.min()):.1f} %, "
            f"{seconds:.1f} s a seed"
        )
