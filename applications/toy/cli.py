"""The command line: `python -m applications.toy hyper-cleaning|task-weights`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table

from applications.command_line import Report, Seed, Threads, guarded, progress_bars, use_threads
from applications.files import make_folder, write_json
from applications.records import spread
from applications.settings import Method
from applications.toy.cleaning import CleaningResult, CleaningSettings
from applications.toy.data import Convention
from applications.toy.figures import draw_cleaning, draw_task_weights
from applications.toy.hyper_cleaning import run_hyper_cleaning
from applications.toy.models import Model
from applications.toy.task_results import Result, Settings
from applications.toy.task_weights import run_task_weights
from applications.toy.tasks import TaskSettings

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Classification with cross-entropy: weights learned by bilevel descent.",
)
console = Console()

Data = Annotated[
    Path | None, typer.Option(help="Folder of IDX files; without it, scikit-learn's digits.")
]
Seeds = Annotated[int, typer.Option(help="Runs, each with a seed of its own.", min=1)]


def main() -> None:
    """Run the command line."""
    app()


@app.callback()
def _commands() -> None:
    """Classification with cross-entropy: weights learned by bilevel descent."""


@app.command()
@guarded
def task_weights(
    out: Annotated[Path, typer.Option(help="Folder for results.json and figure.png.")],
    data: Data = None,
    seeds: Seeds = 3,
    tasks: Annotated[int, typer.Option(help="Training tasks of each of four kinds.", min=1)] = 3,
    validations: Annotated[
        int, typer.Option(help="Validation tasks, upright and turned in turn.", min=1)
    ] = 4,
    train: Annotated[int, typer.Option(help="Samples of a training task.", min=1)] = 40,
    validation: Annotated[int, typer.Option(help="Samples of a validation task.", min=1)] = 20,
    test: Annotated[int, typer.Option(help="Test samples of a validation task.", min=1)] = 200,
    method: Annotated[Method, typer.Option(help="Of hypergradients.")] = Method.IMPLICIT,
    updates: Annotated[int, typer.Option(help="Of the weights.", min=1)] = 25,
    inner_steps: Annotated[int, typer.Option(help="Of the model an update.", min=1)] = 20,
    fit_steps: Annotated[int, typer.Option(help="Of each model compared.", min=1)] = 300,
    entropy: Annotated[
        float, typer.Option(help="Reward of even weights, against collapse to one task.", min=0)
    ] = 0.05,
    seed: Seed = 0,
    threads: Threads = 0,
) -> None:
    """Learn which training tasks help which validation tasks, and compare what comes of it."""
    use_threads(threads)
    settings = Settings(
        TaskSettings(tasks, validations, train, validation, test),
        data,
        seeds,
        seed,
        method,
        updates,
        inner_steps=inner_steps,
        fit_steps=fit_steps,
        entropy=entropy,
    )
    _carry_out(out, partial(run_task_weights, settings), draw_task_weights, _print)


@app.command()
@guarded
def hyper_cleaning(
    out: Annotated[Path, typer.Option(help="Folder for results.json and figure.png.")],
    data: Data = None,
    seeds: Seeds = 1,
    model: Annotated[Model, typer.Option(help="What is trained.")] = Model.LINEAR,
    train: Annotated[int | None, typer.Option(help="Training samples; 5000, digits 600.")] = None,
    validation: Annotated[
        int | None, typer.Option(help="Validation samples; 5000, digits 400.")
    ] = None,
    test: Annotated[int | None, typer.Option(help="Test samples; 10000, digits 797.")] = None,
    share: Annotated[float, typer.Option(help="Of training labels that are corrupted.")] = 0.5,
    convention: Annotated[
        Convention,
        typer.Option(help="uniform: drawn anew from all classes, some right; exact: all wrong."),
    ] = Convention.UNIFORM,
    method: Annotated[Method, typer.Option(help="Of hypergradients.")] = Method.IMPLICIT,
    updates: Annotated[int, typer.Option(help="Of the weights, at most.", min=1)] = 24,
    inner_steps: Annotated[int, typer.Option(help="Of the model an update.", min=1)] = 10,
    decay: Annotated[
        float, typer.Option(help="Weight decay while weights are learned.", min=0)
    ] = 0.01,
    hidden: Annotated[int, typer.Option(help="mlp: hidden units.", min=1)] = 300,
    seed: Seed = 0,
    threads: Threads = 0,
) -> None:
    """Learn which training labels are wrong from clean validation data, and train without them."""
    use_threads(threads)
    standard = CleaningSettings(data).parts
    parts = tuple(
        own if given is None else given
        for given, own in zip((train, validation, test), standard, strict=True)
    )
    settings = CleaningSettings(
        data,
        model,
        (parts[0], parts[1], parts[2]),
        share,
        convention,
        seeds,
        seed,
        method,
        updates,
        inner_steps=inner_steps,
        learning_decay=decay,
        hidden=hidden,
    )
    _carry_out(out, partial(run_hyper_cleaning, settings), draw_cleaning, _print_cleaning)


R = TypeVar("R", Result, CleaningResult)


def _carry_out(
    out: Path,
    run: Callable[[Report], R],
    draw: Callable[[Path, R], None],
    tell: Callable[[R], None],
) -> None:
    """Run an experiment, and leave its results in a folder and on the screen."""
    make_folder(out)
    with progress_bars(console) as report:
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
