"""Tasks: fully sampled slices by role, and how they are undersampled."""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from applications.errors import InputError
from applications.mri.data import SliceDataset, VolumeFile, examined
from applications.mri.sampling import Sampling
from applications.mri.simulation.anatomy import split
from applications.mri.simulation.phantoms import ROLES, SimulationSettings, simulate_folder
from applications.mri.tasks.task_list import TaskSettings
from applications.mri.training.draws import Source, TargetNoise

_LONGEST_NAME = 160  # bytes; file systems take 255, and way, seed and suffix are added


@dataclass(frozen=True, eq=False)
class Task:
    """Slices of a task by role, no slice in two of them, and how they are undersampled.

    Attributes:
        settings: what it was made from.
        sampling: undersamples the slices.
        parts: the slices of each role the task has.
    """

    settings: TaskSettings
    sampling: Sampling
    parts: Mapping[str, SliceDataset]

    @property
    def name(self) -> str:
        """In figures and results."""
        return self.settings.name

    def source(self, role: str, seed: int = 0, number: int = 0) -> Source:
        """The slices of a role as a training draws them.

        Args:
            role: one that the task has.
            seed: of the noise on references that the settings ask for, which only slices to train
                on get.
            number: of the task among others, which have other noise.

        Returns:
            The source.
        """
        level = self.settings.target_noise if role == "train" else 0.0
        noise = TargetNoise(level, (seed, len(ROLES), number)) if level else None
        return Source(self.parts[role], (self.sampling,), noise)


@dataclass(frozen=True, eq=False)
class Tasks:
    """All tasks, as Algorithm 3 takes them.

    Attributes:
        every: in the order of the list.

    Raises:
        InputError: if there is none to train on or none to validate on, or a name comes twice.
    """

    every: tuple[Task, ...]

    def __post_init__(self) -> None:
        """Check the tasks."""
        check_names([task.name for task in self.every])
        for role, symbol in (("train", "N"), ("validation", "M")):
            if not self.of(role):
                raise InputError(
                    f"at least one task with the role {role} was needed, {symbol} = 0 of "
                    f"{len(self.every)} tasks have it; add a task, or the role."
                )

    def of(self, role: str) -> tuple[Task, ...]:
        """The tasks with a role: the N training tasks, the M validation tasks, those to test."""
        return tuple(task for task in self.every if role in task.parts)

    def sources(self, role: str, seed: int = 0) -> tuple[Source, ...]:
        """What a training draws from, by the tasks with a role; see `Task.source`."""
        return tuple(task.source(role, seed, i) for i, task in enumerate(self.of(role)))


def open_tasks(
    settings: Sequence[TaskSettings],
    folder: Path,
    done: Callable[[int, int], None] | None = None,
) -> Tasks:
    """`open_each`, as Algorithm 3 takes them.

    Args:
        settings: the list.
        folder: for simulated scans.
        done: told of the tasks opened and to be opened.

    Returns:
        The tasks.

    Raises:
        InputError: as in `open_each`, or if none is to be trained or validated on.
    """
    return Tasks(open_each(settings, folder, done))


def open_each(
    settings: Sequence[TaskSettings],
    folder: Path,
    done: Callable[[int, int], None] | None = None,
) -> tuple[Task, ...]:
    """The tasks, their scans found or simulated.

    Args:
        settings: the list.
        folder: for simulated scans; tasks of the same settings share theirs.
        done: told of the tasks opened and to be opened.

    Returns:
        The tasks.

    Raises:
        InputError: if the list is empty, names come twice, a folder has no scans, or a task lacks
            the slices of a role.
    """
    if not settings:
        raise InputError("at least one task was needed, the list is empty; add tasks.")
    check_names([one.name for one in settings])
    samplings = [one.sampling for one in settings]  # mistakes there show before the simulation
    tasks: list[Task] = []
    simulated: set[Path] = set()
    for one, sampling in zip(settings, samplings, strict=True):
        try:
            source = one.scans or _simulated(one, folder, simulated)
            tasks.append(Task(one, sampling, _parts(one, source)))
        except InputError as error:
            raise InputError(f"task {one.name!r}: {error}") from error
        if done is not None:
            done(len(tasks), len(settings))
    return tuple(tasks)


def file_name(name: str) -> str:
    """A task's name as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", name)


def check_names(names: Iterable[str]) -> None:
    """Refuse names that come twice, or name one file, and what no model can be called.

    Args:
        names: of tasks.

    Raises:
        InputError: naming the first.
    """
    known: dict[str, str] = {}
    for name in names:
        if len(file_name(name).encode()) > _LONGEST_NAME:
            raise InputError(
                f"the name of a task must have at most {_LONGEST_NAME} bytes, {name[:40]!r}... has "
                "more; shorten it."
            )
        if name.startswith("adapted-"):
            raise InputError(
                f"the models adapted to a task are called so, {name!r} must not begin with "
                "'adapted-'; rename it."
            )
        # Some file systems do not tell capitals, or ways to write an accent, apart.
        file = unicodedata.normalize("NFC", file_name(name)).casefold()
        if name == known.get(file):
            raise InputError(f"each task needs a name of its own, {name!r} came twice; rename one.")
        if file in known:
            raise InputError(
                f"each task needs files of its own, {known[file]!r} and {name!r} would both be "
                f"{file_name(name)!r} there; rename one."
            )
        known[file] = name


def _parts(settings: TaskSettings, folder: Path) -> dict[str, SliceDataset]:
    """The slices of each role of a task."""
    divided = any((folder / role).is_dir() for role in ROLES)
    if divided:
        missing = [role for role in settings.roles if not (folder / role).is_dir()]
        if missing:
            raise InputError(
                f"{folder}: the folder {missing[0]} was needed for the role {missing[0]}, there is "
                "none beside the others; add it, or leave that out of roles."
            )
        return {role: examined(SliceDataset(folder / role)).slices for role in settings.roles}
    blocks: dict[str, list[VolumeFile]] = {role: [] for role in settings.roles}
    for file in SliceDataset(folder).files:
        try:
            cut = split(file.n_slices)
        except InputError as error:
            raise InputError(
                f"{file.path}: {error} Or put whole volumes into the folders {', '.join(ROLES)}."
            ) from error
        for role, block in blocks.items():
            block.append(replace(file, block=getattr(cut, role)))
    return {role: examined(SliceDataset(block)).slices for role, block in blocks.items()}


def _simulated(settings: TaskSettings, folder: Path, simulated: set[Path]) -> Path:
    """The folder of the simulated scans of a task, simulated unless another task has done so."""
    simulation = SimulationSettings(
        settings.size,
        settings.coils,
        settings.noise,
        repeats=settings.repeats,
        seed=settings.seed,
        local_phase=settings.local_phase,
        reference=settings.reference,
        names=(settings.anatomy or "",),
        wrap=settings.wrap,
    )
    mark = hashlib.sha256(repr(simulation).encode()).hexdigest()[:8]
    place = folder / f"{settings.anatomy}-{mark}"
    if place not in simulated:
        simulate_folder(place, simulation)
        simulated.add(place)
    return place
