"""The command line: `python -m applications.toy task-weights`."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from applications.command_line import Seed, Threads, guarded, progress_bars, use_threads
from applications.files import make_folder, write_json
from applications.toy.figures import draw_task_weights
from applications.toy.task_weights import Method, Result, Settings, run_task_weights, spread
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
    make_folder(out)
    with progress_bars(console) as report:
        result = run_task_weights(settings, report)
    write_json(out / "results.json", result.as_json())
    draw_task_weights(out / "figure.png", result)
    _print(result)
    console.print(f"Results  {out / 'results.json'}")
    console.print(f"Figure   {out / 'figure.png'}")


def _print(result: Result) -> None:
    table = Table(title=f"Test accuracy, {result.data}, mean over {len(result.validations)} tasks")
    for name in ("trained on", "mean [%]", "spread"):
        table.add_column(name, justify="left" if name == "trained on" else "right")
    for way in result.runs[0].accuracies:
        found = 100 * result.accuracy(way)
        table.add_row(way, f"{float(found.mean()):.1f}", f"{spread(found):.1f}")
    console.print(table)
    for form in ("vector", "matrix"):
        learned = [getattr(run, form) for run in result.runs]
        mass = torch.stack([one.related_mass for one in learned])
        seconds = sum(one.seconds for one in learned) / len(learned)
        console.print(
            f"Learned {form}: {100 * float(mass.mean()):.1f} % of the weight on related tasks, "
            f"at least {100 * float(mass.min()):.1f} %, "
            f"{seconds:.1f} s a seed"
        )
