"""The command `train`: what is written on the command line, as settings."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from applications.command_line import Threads, console, progress_bars, say, use_threads
from applications.errors import InputError
from applications.keeping import going_on
from applications.mri.commands.shared import Beginning, TaskLists
from applications.mri.data import SliceDataset, VolumeFile, examined
from applications.mri.data.coil_fits import changes, coil_fits
from applications.mri.network.weights import WEIGHTS, Trained
from applications.mri.sampling import Masking
from applications.mri.tasks.task_list import TaskSettings
from applications.mri.tasks.tasks import Task, open_each
from applications.mri.training.draws import Source
from applications.mri.training.keeping import Keeper, tensorboard
from applications.mri.training.self_supervised import SelfSupervision
from applications.mri.training.settings import TrainingSettings
from applications.mri.training.training import TrainingResult, TrainingState, train
from applications.options import Given
from applications.outputs import Output, claimed
from applications.processes import processes
from applications.records import Report, describe
from applications.settings import setting

_MAY_CHANGE = ("steps", "seconds", "checkpointing")  # length, and what leaves the numbers alone
_STEPS = 1000  # where neither steps nor seconds are limited


@dataclass(frozen=True)
class Scans:
    """Where the scans come from, if not from tasks.

    Attributes:
        data: folder of scans to train on.
        validation: folder of scans to choose the best weights by.
    """

    data: Path | None = setting(None, "Folder of .h5 scans, fully sampled; or give tasks.")
    validation: Path | None = setting(
        None, "Folder of scans to choose the best weights by; tasks have their own."
    )


@dataclass(frozen=True, eq=False)
class _Opened:
    """Scans to train on, and those to look at, if any."""

    slices: SliceDataset | list[Source]
    looked_at: SliceDataset | list[Source] | None

    @property
    def files(self) -> list[VolumeFile]:
        return _files(self.slices) + _files(self.looked_at or [])

    @property
    def paths(self) -> list[Path]:
        return [file.path for file in self.files]


def train_command(
    out: Annotated[Path, typer.Option(help="Weights to write, safetensors.")],
    scans: Scans,
    tasks: TaskLists,
    beginning: Annotated[Beginning, "Network"],
    masking: Annotated[Masking, "Mask"],
    training: Annotated[Given[TrainingSettings], "Training"],
    self_supervised: Annotated[
        bool,
        typer.Option(
            "--self-supervised",
            help="Scans are undersampled: hold out a part of their samples, outside a central "
            "square of --calibration.",
        ),
    ] = False,
    board: Annotated[
        Path | None, typer.Option("--tensorboard", help="Folder for TensorBoard.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the interrupted training of --out, if any."),
    ] = False,
    threads: Threads = 0,
) -> None:
    """Train a network by Algorithm 2; Ctrl-C leaves the weights and the state of the training."""
    use_threads(threads)
    sampled = _sampled(masking, self_supervised=self_supervised)
    listed = _listed(scans, tasks, sampled)
    looks = _looks(training, possible=bool(listed or scans.validation))
    limited = training.values["steps"] or training.values["seconds"]
    settings = training.settings(**sampled, **({} if limited else {"steps": _STEPS}))
    with ExitStack() as stack:
        out = stack.enter_context(processes(out))
        report = stack.enter_context(progress_bars())
        written = [Output(out, WEIGHTS)]
        inputs = [*tasks.files, *beginning.files]
        if scans.data is None:
            stack.enter_context(claimed(written, inputs))
            place = Path(stack.enter_context(TemporaryDirectory(prefix="scans-")))
            opened = _of_tasks(listed, place, report, settings.seed, looks=looks)
        else:
            validation = None if scans.validation is None else SliceDataset(scans.validation)
            opened = _Opened(SliceDataset(scans.data), validation)
            stack.enter_context(claimed(written, [*inputs, *opened.paths]))
            opened = _examined(opened, report, full=not self_supervised)
        begun = _begun(beginning, opened, settings.seed)
        record = describe(settings)
        if listed:
            record["samplings"] = {one.name: repr(one.sampling) for one in listed}
            record["target noise"] = {one.name: one.target_noise for one in listed}
        found = _trained(out, begun, opened, settings, record, report, board, resume=resume)
    _print(found, out)


def _examined(opened: _Opened, report: Report, *, full: bool) -> _Opened:
    """Scans without slices that are zero or not finite; says what was found."""

    def look(slices: SliceDataset) -> SliceDataset:
        looked = examined(slices, full=full, report=lambda share: report("looking", share))
        for line in looked.remarks:
            say(line)
        return looked.slices

    slices, looked_at = opened.slices, opened.looked_at
    return _Opened(
        look(slices) if isinstance(slices, SliceDataset) else slices,
        look(looked_at) if isinstance(looked_at, SliceDataset) else looked_at,
    )


def _trained(
    out: Path,
    begun: Trained,
    opened: _Opened,
    settings: TrainingSettings,
    record: dict[str, Any],
    report: Report,
    board: Path | None,
    *,
    resume: bool,
) -> TrainingResult:
    """The training, kept in files while it goes on."""
    now = record | {"data": _contents(opened.slices), "validated": _contents(opened.looked_at)}
    conditions = {name: value for name, value in now.items() if name not in _MAY_CHANGE}
    conditions["architecture"] = asdict(begun.network.architecture)
    with ExitStack() as stack:
        told = None if board is None else stack.enter_context(tensorboard(board))
        kept = stack.enter_context(going_on(state_folder(out), conditions, resume=resume))
        keeper = stack.enter_context(Keeper(out, begun.network, record, report))

        def after_step(now: TrainingState) -> None:
            if told is not None:
                told(now)
            keeper(now)

        looked_at, keep = opened.looked_at, kept.keep("training")
        found = train(
            begun.network, begun.control, opened.slices, settings, after_step, looked_at, keep
        )
        keeper.save(found.control)
    return found


def state_folder(weights: Path) -> Path:
    """Where a training keeps its state that writes `weights`."""
    return weights.with_name(f"{weights.name}.state")


def _print(found: TrainingResult, out: Path) -> None:
    mean = sum(found.costs[-20:]) / len(found.costs[-20:])
    console.print(
        f"{len(found.costs)} updates in {found.seconds:.0f} s, mean loss of the last 20: {mean:.4g}"
    )
    if found.looks:
        best = min(found.looks, key=lambda look: look.cost)
        early = ", stopped by patience" if found.stopped else ""
        console.print(f"Least validation loss {best.cost:.4g} after update {best.step}{early}")
    console.print(f"Weights  {out}")


def _sampled(masking: Masking, *, self_supervised: bool) -> dict[str, Any]:
    """The fields of the settings that say what is left out of a scan."""
    if not self_supervised:
        return {"samplings": (masking.sampling,)}
    if replace(masking, calibration=None) != Masking():
        raise InputError(
            "--self-supervised takes the mask of each scan, got options of another mask; leave "
            "--mask and its settings out, except for --calibration, the square that is not split."
        )
    centre = masking.calibration
    supervision = SelfSupervision() if centre is None else SelfSupervision(centre=centre)
    return {"self_supervision": supervision}


def _listed(scans: Scans, tasks: TaskLists, sampled: dict[str, Any]) -> list[TaskSettings]:
    """The tasks, if scans come from them."""
    if (scans.data is None) == tasks.empty:
        came = "neither" if scans.data is None else "both"
        raise InputError(
            f"scans of a folder or of tasks were needed, got {came}; give --data FOLDER, or "
            "--tasks FILE and --task once a task."
        )
    if scans.data is not None:
        return []
    listed = tasks.listed()
    if scans.validation or sampled != _sampled(Masking(), self_supervised=False):
        raise InputError(
            "tasks bring masks and validation scans of their own, got options of others beside "
            "them; leave --mask, its settings, --self-supervised and --validation out."
        )
    return listed


def _looks(training: Given[TrainingSettings], *, possible: bool) -> bool:
    """Whether looks at validation scans were asked for."""
    asked = any(training.values[name] is not None for name in ("validate_every", "patience"))
    if asked and not possible:
        raise InputError(
            "--validate-every and --patience need scans to look at, got no --validation; name a "
            "folder of them, or leave both out."
        )
    return asked


def _of_tasks(
    listed: Sequence[TaskSettings], place: Path, report: Report, seed: int, *, looks: bool
) -> _Opened:
    tasks = open_each(listed, place, lambda k, n: report("opening tasks", k / n))
    looked_at = _of_role(tasks, "validation", seed) if looks else None
    return _Opened(_of_role(tasks, "train", seed), looked_at)


def _of_role(tasks: Sequence[Task], role: str, seed: int) -> list[Source]:
    having = [one for one in tasks if role in one.parts]
    found = [one.source(role, seed, i) for i, one in enumerate(having)]
    if not found:
        raise InputError(
            f"at least one task with the role {role} was needed, none of {len(tasks)} has it; add "
            "a task, or the role."
        )
    return found


def _begun(beginning: Beginning, opened: _Opened, seed: int) -> Trained:
    """The network with the weights to begin with; says what it does to coils."""
    if beginning.coils is None and beginning.init is None and beginning.coils_matter:
        beginning = replace(beginning, coils=_coil_count(_files(opened.slices)))
    begun = beginning.weights()(seed)
    for change in changes(coil_fits(opened.files, begun.network.architecture.n_coils)):
        console.print(change)
    return begun


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
