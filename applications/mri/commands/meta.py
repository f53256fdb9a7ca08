"""The commands `meta-train` and `transfer`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import bilevel as bl
from applications.command_line import Threads, console, progress_bars, use_threads
from applications.errors import InputError
from applications.files import write_json
from applications.keeping import going_on
from applications.mri.commands.shared import Beginning, TaskLists
from applications.mri.meta.experiment import RECORDS as META_RECORDS, run_meta
from applications.mri.meta.figures import draw_meta, draw_transfer
from applications.mri.meta.results import Experiment, ExperimentSettings, with_spread
from applications.mri.meta.settings import MetaSettings
from applications.mri.meta.transfer import (
    RECORDS as TRANSFER_RECORDS,
    learned_correlation,
    measure_transfer,
    meta_models,
)
from applications.mri.meta.transfer_results import Transfer, TransferSettings
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import WEIGHTS, Trained
from applications.mri.tasks.task_facts import facts_of
from applications.mri.tasks.task_list import TaskSettings, read_task_list
from applications.mri.tasks.tasks import check_names, open_each, open_tasks
from applications.outputs import PICTURE, Output, claimed, results
from applications.processes import processes
from applications.records import describe

Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the interrupted run of --out, if any.")
]
Folder = Annotated[Path, typer.Option(help="Folder for results, figure, weights and scans.")]


def meta_train(
    out: Folder,
    tasks: TaskLists,
    beginning: Annotated[Beginning, "Network"],
    settings: Annotated[ExperimentSettings, "Training"],
    resume: Resume = False,
    threads: Threads = 0,
) -> None:
    """Train on heterogeneous scans and learn the weights of tasks, by Algorithm 3."""
    use_threads(threads)
    listed, begin = tasks.listed(), beginning.weights()
    check_names([one.name for one in listed])
    n_coils = begin(settings.training.seed).network.architecture.n_coils
    with processes(out) as out:
        written = [
            Output(out / "results.json", results("summary", records={"runs": ("ablation",)})),
            Output(out / "figure.png", PICTURE),
            *(Output(one, WEIGHTS) for one in (out / "weights").glob("*.safetensors")),
        ]
        begun = begin(settings.training.seed)
        conditions = _conditions(settings.training, settings, listed, begun)
        with (
            claimed(written, [*tasks.files, *beginning.files], out),
            going_on(out / "state", conditions, META_RECORDS, resume=resume) as kept,
            progress_bars() as report,
        ):
            opened = open_tasks(listed, out / "scans", lambda k, n: report("opening tasks", k / n))
            facts = tuple(facts_of(one, n_coils) for one in opened.every)
            for one in facts:
                console.print(one.summary)
            found = run_meta(opened, facts, begin, out, settings, report, kept)
            draw_meta(out / "figure.png", found)
        _print(found)
        _print_places(out, "results.json", "figure.png", "weights")


def transfer(
    out: Folder,
    tasks: TaskLists,
    beginning: Annotated[Beginning, "Network"],
    settings: Annotated[TransferSettings, "Training"],
    unseen: Annotated[
        Path | None, typer.Option(help="Task list of others: train to adapt on, test to score.")
    ] = None,
    meta: Annotated[
        Path | None, typer.Option(help="Folder of meta-train: models and weights to compare.")
    ] = None,
    resume: Resume = False,
    threads: Threads = 0,
) -> None:
    """Measure what training on one task is worth on others, and how fast models adapt."""
    use_threads(threads)
    listed = tasks.listed()
    others = [] if unseen is None else read_task_list(unseen)
    begun, models = _begun(beginning, meta, settings.training.seed)
    learned = None if meta is None else learned_correlation(meta / "results.json")
    n_coils = begun.network.architecture.n_coils
    written = [
        Output(out / "results.json", results("scores", "rank_correlation")),
        Output(out / "figure.png", PICTURE),
    ]
    inputs = [*tasks.files, *beginning.files, *([] if unseen is None else [unseen])]
    inputs += [] if meta is None else [meta / "results.json"]
    conditions = _conditions(settings.training, settings, [*listed, *others], begun)
    conditions["models"] = sorted(models)
    with (
        claimed(written, inputs, out),
        going_on(out / "state", conditions, TRANSFER_RECORDS, resume=resume) as kept,
        progress_bars() as report,
    ):
        opened = open_tasks(listed, out / "scans", lambda k, n: report("opening tasks", k / n))
        more = open_each(others, out / "scans") if others else ()
        for one in (*opened.every, *more):
            console.print(facts_of(one, n_coils).summary)
        found = measure_transfer(opened, more, begun, models, settings, report, learned, kept)
        write_json(out / "results.json", found.as_json())
        draw_transfer(out / "figure.png", found)
    _print_transfer(found)
    _print_places(out, "results.json", "figure.png")


def _conditions(
    training: MetaSettings,
    settings: ExperimentSettings | TransferSettings,
    tasks: Sequence[TaskSettings],
    begun: Trained,
) -> dict[str, Any]:
    """What must be the same when an interrupted run goes on."""
    told = {n: v for n, v in describe(training).items() if n != "checkpointing"}
    own = {n: v for n, v in describe(settings).items() if n != "training"}
    architecture = asdict(begun.network.architecture)
    return {**told, **own, "tasks": [repr(one) for one in tasks], "architecture": architecture}


def _begun(
    beginning: Beginning, meta: Path | None, seed: int
) -> tuple[Trained, dict[str, bl.PerStep]]:
    """What models of single tasks begin with, and the models that are scored beside them."""
    if meta is None:
        begun = beginning.weights()(seed)
        return begun, {} if beginning.init is None else {"before": begun.control}
    if beginning.named:
        raise InputError(
            "--meta brings its network, got --preset, --coils or --init too; leave them out."
        )
    network, models = meta_models(meta)
    network = Network(network.architecture, seed)
    return Trained(network, network.controls(), {}), models


def _print_places(out: Path, *names: str) -> None:
    for name in names:
        console.print(f"{name.partition('.')[0].capitalize():8} {out / name}")


def _print_transfer(found: Transfer) -> None:
    table = Table(title="PSNR [dB] on test slices; * unseen")
    table.add_column("trained on")
    tasks = (*found.seen, *found.unseen)
    for name in tasks:
        table.add_column(name + "*" * (name in found.unseen), justify="right")
    for model in found.models:
        table.add_row(model, *(f"{found.scores[model][name].psnr:.2f}" for name in tasks))
    console.print(table)
    for name, value in found.agreement().items():
        console.print(f"Rank correlation of learned weights and transfer to {name}: {value:.2f}")


def _print(found: Experiment) -> None:
    title = "Validation tasks, test slices" if found.tested else "Spent"
    table = Table(title=title)
    measures = ("psnr", "ssim") if found.tested else ()
    for name in ("weights", *measures, "updates", "steps", "losses", "seconds"):
        table.add_column(name, justify="left" if name == "weights" else "right")
    for way in found.settings.ablations:
        runs, scores = found.of(way), found.means(way) if found.tested else []
        cells = [
            with_spread(values, digits)
            for measure, digits in zip(measures, (2, 4), strict=False)
            for values in [[getattr(one, measure) for one in scores]]
        ]
        spent = [
            sum(getattr(run.learned, name) for run in runs) / len(runs)
            for name in ("updates", "inner_steps", "evaluations", "seconds")
        ]
        table.add_row(way, *cells, *(f"{value:.0f}" for value in spent))
    console.print(table)
