"""The command `train`: what is written on the command line, as settings."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console

import bilevel as bl
from applications.command_line import Device, Seed, Threads, progress_bars, use_threads
from applications.errors import InputError
from applications.files import make_place
from applications.mri.commands.choices import (
    Acceleration,
    Calibration,
    Centre,
    Init,
    MaskOption,
    Preset,
    Spokes,
    TaskFile,
    TaskTexts,
    Width,
)
from applications.mri.data import SliceDataset, VolumeFile
from applications.mri.data.coil_fits import changes, coil_fits
from applications.mri.network.weights import beginning
from applications.mri.sampling import chosen_sampling
from applications.mri.tasks.task_list import TaskSettings, listed_tasks
from applications.mri.tasks.tasks import Task, open_each
from applications.mri.training.draws import Source
from applications.mri.training.keeping import Keeper, tensorboard
from applications.mri.training.precision import Precision
from applications.mri.training.resuming import StateFile
from applications.mri.training.schedules import Constant, Cosine, Schedule, Step
from applications.mri.training.self_supervised import SelfSupervision
from applications.mri.training.settings import TrainingSettings
from applications.mri.training.training import TrainingState, train
from applications.mri.training.validation import Validation
from applications.records import describe

console = Console()
_SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "cosine": Cosine,
    "constant": Constant,
    "step": Step,
}


def train_command(
    out: Annotated[Path, typer.Option(help="Weights to write, safetensors.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of .h5 scans, fully sampled; or give tasks.")
    ] = None,
    tasks: TaskFile = None,
    task: TaskTexts = None,
    preset: Preset = None,
    coils: Annotated[
        int | None, typer.Option(help="Of the network; as many as the scans have.", min=1)
    ] = None,
    init: Init = None,
    mask: MaskOption = "random",
    acceleration: Acceleration = None,
    center: Centre = None,
    calibration: Calibration = None,
    width: Width = None,
    spokes: Spokes = None,
    self_supervised: Annotated[
        bool,
        typer.Option(
            "--self-supervised",
            help="Scans are undersampled: hold out a part of their samples, outside a central "
            "square of --calibration.",
        ),
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Updates at most.", min=1)] = None,
    seconds: Annotated[float | None, typer.Option(help="Seconds at most.", min=1)] = None,
    learning_rate: Annotated[float, typer.Option(help="Of Adam at its peak.")] = 3e-3,
    schedule: Annotated[
        str, typer.Option(help=f"Of the learning rate: {', '.join(_SCHEDULES)}.")
    ] = "cosine",
    accumulate: Annotated[int, typer.Option(help="Slices an update.", min=1)] = 1,
    crop: Annotated[int, typer.Option(help="Rows of a training crop, 0: none.", min=0)] = 32,
    whole: Annotated[
        float, typer.Option(help="Last share of the training that sees whole slices.")
    ] = 0.2,
    validation: Annotated[
        Path | None,
        typer.Option(help="Folder of scans to choose the best weights by; tasks have their own."),
    ] = None,
    validate_every: Annotated[
        int | None, typer.Option(help="Updates between looks at them; 100.", min=1)
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many looks without gain.", min=1)
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Memory of a sweep, such as '500 MiB'.")
    ] = None,
    device: Device = "cpu",
    precision: Annotated[
        Precision, typer.Option(help="Of the convolutions; bfloat16 needs a GPU.")
    ] = Precision.FLOAT32,
    board: Annotated[
        Path | None, typer.Option("--tensorboard", help="Folder for TensorBoard.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted training of --out.")
    ] = False,
    seed: Seed = 0,
    threads: Threads = 0,
) -> None:
    """Train a network by Algorithm 2; Ctrl-C leaves the weights and the state of the training."""
    use_threads(threads)
    masking = {
        "acceleration": acceleration,
        "center_fraction": center,
        "calibration": calibration,
        "width": width,
        "spokes": spokes,
    }
    sampled = _sampled(mask, masking, self_supervised=self_supervised)
    listed = _listed(data, tasks, task or [])
    if listed and (validation or sampled != _sampled("random", {}, self_supervised=False)):
        raise InputError(
            "tasks bring masks and validation scans of their own, got options of others beside "
            "them; leave --mask, its settings, --self-supervised and --validation out."
        )
    settings = TrainingSettings(
        **sampled,
        steps=steps if steps or seconds else 1000,
        seconds=seconds,
        learning_rate=learning_rate,
        schedule=_named("schedule", _SCHEDULES, schedule)(),
        accumulate=accumulate,
        crop=crop,
        whole=whole,
        validation=_looks(validate_every, patience, possible=bool(listed or validation)),
        checkpointing=bl.Checkpointing() if budget is None else bl.Budget(budget),
        device=device,
        precision=precision,
        seed=seed,
    )
    with ExitStack() as stack:
        report = stack.enter_context(progress_bars(console))
        slices: SliceDataset | list[Source]
        looked_at: SliceDataset | list[Source] | None = None
        if data is not None:
            slices = SliceDataset(data)
            looked_at = None if validation is None else SliceDataset(validation)
        else:
            place = Path(stack.enter_context(TemporaryDirectory(prefix="scans-")))
            opened = open_each(listed, place, lambda k, n: report("opening tasks", k / n))
            slices = _of_role(opened, "train")
            looked_at = _of_role(opened, "validation") if validate_every or patience else None
        make_place(out)
        if coils is None and init is None:
            coils = _coil_count(_files(slices))
        trained = beginning(init, preset, coils)(seed)
        every_file = _files(slices) + _files(looked_at or [])
        for change in changes(coil_fits(every_file, trained.network.architecture.n_coils)):
            console.print(change)
        record = describe(settings)
        if listed:
            record["samplings"] = {one.name: repr(one.sampling) for one in listed}
        conditions = record | {"data": _contents(slices), "validated": _contents(looked_at)}
        state = StateFile(out.with_name(f"{out.name}.state"), trained.network, conditions)
        begin = state.load() if resume else trained.control
        told = None if board is None else stack.enter_context(tensorboard(board))
        keeper = Keeper(out, trained.network, record, report, state)
        stack.enter_context(keeper)

        def after_step(now: TrainingState) -> None:
            if told is not None:
                told(now)
            keeper(now)

        found = train(trained.network, begin, slices, settings, after_step, looked_at)
        keeper.finish(found.control)
    mean = sum(found.costs[-20:]) / len(found.costs[-20:])
    console.print(
        f"{len(found.costs)} updates in {found.seconds:.0f} s, mean loss of the last 20: {mean:.4g}"
    )
    if found.looks:
        best = min(found.looks, key=lambda look: look.cost)
        early = ", stopped by patience" if found.stopped else ""
        console.print(f"Least validation loss {best.cost:.4g} after update {best.step}{early}")
    console.print(f"Weights  {out}")


def _sampled(
    mask: str, masking: dict[str, float | None], *, self_supervised: bool
) -> dict[str, Any]:
    if not self_supervised:
        return {"samplings": (chosen_sampling(mask, **masking),)}
    given = {name for name, value in masking.items() if value is not None}
    if mask != "random" or given - {"calibration"}:
        raise InputError(
            "--self-supervised takes the mask of each scan, got options of another mask; leave "
            "--mask and its settings out, except for --calibration, the square that is not split."
        )
    centre = masking["calibration"]
    supervision = SelfSupervision() if centre is None else SelfSupervision(centre=int(centre))
    return {"self_supervision": supervision}


def _listed(data: Path | None, tasks: Path | None, texts: list[str]) -> list[TaskSettings]:
    if (data is None) == (tasks is None and not texts):
        came = "neither" if data is None else "both"
        raise InputError(
            f"scans of a folder or of tasks were needed, got {came}; give --data FOLDER, or "
            "--tasks FILE and --task once a task."
        )
    return [] if data is not None else listed_tasks(tasks, texts)


def _of_role(tasks: Sequence[Task], role: str) -> list[Source]:
    found = [Source(one.parts[role], (one.sampling,)) for one in tasks if role in one.parts]
    if not found:
        raise InputError(
            f"at least one task with the role {role} was needed, none of {len(tasks)} has it; add "
            "a task, or the role."
        )
    return found


def _looks(every: int | None, patience: int | None, *, possible: bool) -> Validation:
    if not possible and not (every is None and patience is None):
        raise InputError(
            "--validate-every and --patience need scans to look at, got no --validation; name a "
            "folder of them, or leave both out."
        )
    return Validation(patience=patience) if every is None else Validation(every, patience)


def _named(option: str, known: dict[str, Any], name: str) -> Any:
    if name not in known:
        raise InputError(f"{option} must be one of {', '.join(known)}, got {name!r}.")
    return known[name]


def _files(scans: SliceDataset | Sequence[Source]) -> list[VolumeFile]:
    each = [scans] if isinstance(scans, SliceDataset) else [one.slices for one in scans]
    return [file for slices in each for file in slices.files]


def _contents(scans: SliceDataset | Sequence[Source] | None) -> list[tuple[str, int]]:
    return [(file.path.name, file.n_slices) for file in _files(scans or [])]


def _coil_count(files: Sequence[VolumeFile]) -> int:
    counts = sorted({file.n_coils for file in files})
    if len(counts) > 1:
        raise InputError(
            f"one coil count was needed, the scans have {', '.join(map(str, counts))}; choose one "
            "by --coils, and the others are compressed or padded."
        )
    return counts[0]
