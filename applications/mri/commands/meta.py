"""The commands `meta-train` and `transfer`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import bilevel as bl
from applications.command_line import Device, Seed, Threads, guarded, progress_bars, use_threads
from applications.errors import InputError
from applications.files import make_folder, write_json
from applications.mri.commands.choices import Init, Preset, TaskFile, TaskTexts
from applications.mri.meta.experiment import run_meta
from applications.mri.meta.figures import draw_meta, draw_transfer
from applications.mri.meta.results import Experiment, ExperimentSettings, with_spread
from applications.mri.meta.settings import Ablation, MetaSettings, Rule
from applications.mri.meta.transfer import learned_correlation, measure_transfer, meta_models
from applications.mri.meta.transfer_results import Transfer, TransferSettings
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained, beginning
from applications.mri.tasks.task_facts import facts_of
from applications.mri.tasks.task_list import listed_tasks, read_task_list
from applications.mri.tasks.tasks import open_each, open_tasks
from applications.settings import Method

console = Console()

Coils = Annotated[int | None, typer.Option(help="Of the network; 8.", min=1)]
KeepGraphs = Annotated[
    bool,
    typer.Option("--keep-graphs", help="Keep the graphs of all phases: faster, and more memory."),
]


@guarded
def meta_train(
    out: Annotated[Path, typer.Option(help="Folder for results, figure, weights and scans.")],
    tasks: TaskFile = None,
    task: TaskTexts = None,
    ablations: Annotated[
        str, typer.Option(help=f"Ways to weigh tasks: {','.join(Ablation)}.")
    ] = ",".join(Ablation),
    preset: Preset = None,
    coils: Coils = None,
    init: Init = None,
    seconds: Annotated[float | None, typer.Option(help="Of each training, at most.")] = None,
    evaluations: Annotated[
        int | None, typer.Option(help="Losses of a slice that each training evaluates, at most.")
    ] = None,
    method: Annotated[Method, typer.Option(help="Of hypergradients.")] = Method.MLM,
    optimizer: Annotated[Rule, typer.Option(help="Of the network.")] = Rule.ADAM,
    inner_steps: Annotated[int, typer.Option(help="Of the network an update.", min=1)] = 5,
    learning_rate: Annotated[float, typer.Option(help="Of the network at its peak.")] = 3e-3,
    outer_rate: Annotated[
        float, typer.Option(help="Length of a step of the task weights at most.")
    ] = 0.7,
    outer_clip: Annotated[
        float, typer.Option(help="Relative hypergradient whose step has that length.")
    ] = 0.1,
    learn_share: Annotated[
        float, typer.Option(help="Of the budget, in which task weights move.")
    ] = 0.2,
    batch: Annotated[int, typer.Option(help="Slices a task in a minibatch.", min=1)] = 1,
    crop: Annotated[int, typer.Option(help="Rows of a training crop, 0: none.", min=0)] = 32,
    entropy: Annotated[float, typer.Option(help="Reward of spread weights.", min=0)] = 0.0,
    floor: Annotated[float, typer.Option(help="Least weight of a task.", min=0)] = 0.0,
    penalty: Annotated[float, typer.Option(help="lambda of the penalty method.")] = 1.0,
    penalty_rate: Annotated[float, typer.Option(help="Of Adam on its task weights.")] = 0.1,
    adapt_steps: Annotated[
        int, typer.Option(help="Of the model towards each training task; 0: none.", min=0)
    ] = 0,
    adapt_slices: Annotated[int, typer.Option(help="That it is adapted on.", min=1)] = 4,
    keep_graphs: KeepGraphs = False,
    seeds: Annotated[int, typer.Option(help="Runs.", min=1)] = 1,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Train on heterogeneous scans and learn the weights of tasks, by Algorithm 3."""
    use_threads(threads)
    training = MetaSettings(
        seconds,
        evaluations,
        method,
        optimizer,
        inner_steps,
        learning_rate,
        outer_rate=outer_rate,
        outer_clip=outer_clip,
        learn_share=learn_share,
        batch=batch,
        crop=crop,
        entropy=entropy,
        floor=floor,
        penalty=penalty,
        penalty_rate=penalty_rate,
        checkpointing=_checkpointing(keep_graphs),
        seed=seed,
        device=device,
    )
    settings = ExperimentSettings(training, _ablations(ablations), seeds, adapt_steps, adapt_slices)
    listed = listed_tasks(tasks, task or [])
    begin = beginning(init, preset, coils)
    n_coils = begin(seed).network.architecture.n_coils
    make_folder(out)
    with progress_bars(console) as report:
        opened = open_tasks(listed, out / "scans", lambda k, n: report("opening tasks", k / n))
        facts = tuple(facts_of(one, n_coils) for one in opened.every)
        for one in facts:
            console.print(one.summary)
        found = run_meta(opened, facts, begin, out, settings, report)
    draw_meta(out / "figure.png", found)
    _print(found)
    for name in ("results.json", "figure.png", "weights"):
        console.print(f"{name.partition('.')[0].capitalize():8} {out / name}")


@guarded
def transfer(
    out: Annotated[Path, typer.Option(help="Folder for results, figure and scans.")],
    tasks: TaskFile = None,
    task: TaskTexts = None,
    unseen: Annotated[
        Path | None, typer.Option(help="Task list of others: train to adapt on, test to score.")
    ] = None,
    meta: Annotated[
        Path | None, typer.Option(help="Folder of meta-train: models and weights to compare.")
    ] = None,
    preset: Preset = None,
    coils: Coils = None,
    init: Init = None,
    seconds: Annotated[float | None, typer.Option(help="Of training on one task.")] = None,
    evaluations: Annotated[
        int | None, typer.Option(help="Losses of a slice that training on one task evaluates.")
    ] = None,
    optimizer: Annotated[Rule, typer.Option(help="Of the network.")] = Rule.ADAM,
    learning_rate: Annotated[float, typer.Option(help="Of the network at its peak.")] = 3e-3,
    batch: Annotated[int, typer.Option(help="Slices in a minibatch.", min=1)] = 1,
    crop: Annotated[int, typer.Option(help="Rows of a training crop, 0: none.", min=0)] = 32,
    steps: Annotated[str, typer.Option(help="Of adaptation.")] = "0,1,5,20",
    slices: Annotated[int, typer.Option(help="That models adapt on.", min=1)] = 2,
    keep_graphs: KeepGraphs = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Measure what training on one task is worth on others, and how fast models adapt."""
    use_threads(threads)
    training = MetaSettings(
        seconds,
        evaluations,
        optimizer=optimizer,
        learning_rate=learning_rate,
        batch=batch,
        crop=crop,
        checkpointing=_checkpointing(keep_graphs),
        seed=seed,
        device=device,
    )
    settings = TransferSettings(training, _numbers(steps), slices)
    listed = listed_tasks(tasks, task or [])
    others = [] if unseen is None else read_task_list(unseen)
    begun, learned = beginning(init, preset, coils)(seed), None
    models = {} if init is None else {"before": begun.control}
    if meta is not None:
        if any(option is not None for option in (preset, coils, init)):
            raise InputError(
                "--meta brings its network, got --preset, --coils or --init too; leave them out."
            )
        network, models = meta_models(meta)
        learned = learned_correlation(meta / "results.json")
        network = Network(network.architecture, seed)
        begun = Trained(network, network.controls(), {})
    n_coils = begun.network.architecture.n_coils
    make_folder(out)
    with progress_bars(console) as report:
        opened = open_tasks(listed, out / "scans", lambda k, n: report("opening tasks", k / n))
        more = open_each(others, out / "scans") if others else ()
        for one in (*opened.every, *more):
            console.print(facts_of(one, n_coils).summary)
        found = measure_transfer(opened, more, begun, models, settings, report, learned)
    write_json(out / "results.json", found.as_json())
    draw_transfer(out / "figure.png", found)
    _print_transfer(found)
    for name in ("results.json", "figure.png"):
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


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--steps must be whole numbers, as 0,1,5,20, got {text!r}.") from None


def _checkpointing(keep_graphs: bool) -> bl.Checkpointing:
    return bl.Checkpointing(block=None) if keep_graphs else bl.Checkpointing()


def _ablations(text: str) -> tuple[Ablation, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in list(Ablation):
            raise InputError(f"--ablations must be some of {','.join(Ablation)}, got {name!r}.")
    return tuple(Ablation(name) for name in names)


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
