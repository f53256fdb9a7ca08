"""Lists of tasks, in YAML or on the command line, and what their entries say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from applications.errors import InputError
from applications.inputs import content as content_of, reading
from applications.mri.sampling import Masking, Sampling
from applications.mri.simulation.phantoms import ROLES

_MOST_BYTES, _MOST_NODES = 2**16, 20_000  # of a list
_MOST = {"coils": 1024, "seed": 2**63, "size": 2**12, "repeats": 10_000}
_MOST_NUMBER = 10**5
_LETTERS = 16  # that count as a node
_NUMBERS = {
    "acceleration": float,
    "center": float,
    "calibration": int,
    "width": float,
    "spokes": int,
    "size": int,
    "coils": int,
    "noise": float,
    "local_phase": float,
    "repeats": int,
    "target_noise": float,
    "wrap": float,
    "seed": int,
}


@dataclass(frozen=True)
class TaskSettings:
    """One entry of a task list.

    Attributes:
        name: in figures and results.
        scans: folder of fully sampled files in the layout of fastMRI; with the folders `train`,
            `validation` and `test` in it the files of those, else each volume is cut into blocks of
            slices by `anatomy.split`. Or None.
        anatomy: bundled anatomy to simulate scans of, or None.
        mask: sampling, as the command line names it.
        acceleration: of the sampling, like the next four; None: the default.
        center: fully sampled share of the columns.
        calibration: side of the fully sampled square.
        width: standard deviation of a Gaussian density.
        spokes: of a radial mask.
        roles: what the task is for, some of train, validation, test.
        size: rows and columns of simulated slices.
        coils: of simulated scans.
        noise: of simulated scans, in units of image magnitude.
        seed: of simulated scans.
        wrap: share of the columns that the field of view of simulated scans has; None: as the
            anatomy states it.
        target_noise: standard deviation of complex noise added to the images that the training
            compares with, in units of the largest magnitude of the slice; to study bad references.
        local_phase: of simulated scans, like the next three; see `SimulationSettings`.
        reference: clean or measured.
        repeats: training volumes, each with coils, phases and noise of its own.

    Raises:
        InputError: if a field does not fit.
    """

    name: str
    scans: Path | None = None
    anatomy: str | None = None
    mask: str = "random"
    acceleration: float | None = None
    center: float | None = None
    calibration: int | None = None
    width: float | None = None
    spokes: int | None = None
    roles: tuple[str, ...] = ROLES
    size: int = 128
    coils: int = 8
    noise: float = 0.01
    seed: int = 0
    wrap: float | None = None
    target_noise: float = 0.0
    local_phase: float = 0.0
    reference: str = "clean"
    repeats: int = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        if (self.scans is None) == (self.anatomy is None):
            came = "neither" if self.scans is None else "both"
            raise InputError(
                f"task {self.name!r}: scans, a folder, or anatomy, a bundled one, was needed, got "
                f"{came}; give one of them."
            )
        unknown = [role for role in self.roles if role not in ROLES]
        if unknown or not self.roles:
            raise InputError(
                f"task {self.name!r}: roles must be some of {', '.join(ROLES)}, got "
                f"{'+'.join(self.roles) or 'none'}; join them by +."
            )
        if not self.target_noise >= 0:
            raise InputError(
                f"task {self.name!r}: target_noise must be >= 0, got {self.target_noise}."
            )

    @property
    def sampling(self) -> Sampling:
        """What undersamples the slices."""
        try:
            return Masking(
                self.mask,
                self.acceleration,
                self.center,
                self.calibration,
                self.width,
                self.spokes,
            ).sampling
        except InputError as error:
            raise InputError(f"task {self.name!r}: {error}") from error


def listed_tasks(path: Path | None, texts: Sequence[str]) -> list[TaskSettings]:
    """The entries of a file and of the command line.

    Args:
        path: YAML, see `read_task_list`; or None.
        texts: one an entry, see `parse_task`.

    Returns:
        The entries, those of the file first.

    Raises:
        InputError: if there are none, or one is not of its form.
    """
    if path is None and not texts:
        raise InputError("tasks were needed, got none; give --tasks FILE, or --task once a task.")
    return [*(read_task_list(path) if path else []), *map(parse_task, texts)]


def read_task_list(path: Path) -> list[TaskSettings]:
    """The entries of a YAML file.

    Args:
        path: a mapping with `tasks`, a list of mappings whose keys are the fields of
            `TaskSettings`, and perhaps `defaults`, a mapping for all of them. Folders are relative
            to the file.

    Returns:
        The entries, in order.

    Raises:
        InputError: if the file is missing or not of this form.
    """
    if not path.is_file():
        raise InputError(f"{path}: a task list was needed, there is no such file; check the path.")
    text = content_of(path, "a task list", _MOST_BYTES)
    with reading(path, "YAML", "correct it there"):
        content = _loaded(text.decode("utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), list):
        raise InputError(
            f"{path}: a mapping with 'tasks', a list, was needed, got {type(content).__name__}"
            f"{' of ' + ', '.join(map(str, content)) if isinstance(content, dict) else ''}; "
            "see the page on meta-learning."
        )
    _refuse_unknown(content, {"tasks", "defaults"}, str(path))
    defaults = _mapping(content.get("defaults") or {}, f"{path}: defaults")
    return [
        task_settings({**defaults, **_mapping(one, where)}, where, path.parent)
        for i, one in enumerate(content["tasks"], start=1)
        for where in [f"{path}: task {i}"]
    ]


def _loaded(text: str) -> Any:
    """Plain values; an alias counts as often as it stands for something."""
    loader = yaml.SafeLoader(text)
    root = loader.get_single_node()
    counts: dict[int, int] = {}

    def count(node: yaml.Node) -> int:
        """The nodes of a tree whose aliases are written out."""
        if id(node) in counts:
            return counts[id(node)]
        counts[id(node)] = _MOST_NODES + 1  # of a node in itself
        if isinstance(node, yaml.CollectionNode):
            pairs = [one if isinstance(one, tuple) else (one,) for one in node.value]
            n = 1 + sum(count(part) for pair in pairs for part in pair)
        else:
            n = 1 + len(node.value) // _LETTERS
        counts[id(node)] = n
        if n > _MOST_NODES:
            raise ValueError(f"it has aliases that stand for more than {_MOST_NODES} values")
        return n

    if root is None:
        return None
    count(root)
    return loader.construct_document(root)


def parse_task(text: str) -> TaskSettings:
    """An entry of the command line, such as ``name=a,anatomy=brain_t1_axial,acceleration=4``.

    Args:
        text: key=value, separated by commas; roles are joined by +.

    Returns:
        The entry.

    Raises:
        InputError: if the text is not of this form.
    """
    entry: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or key.strip() in entry:
            raise InputError(
                f"--task must be key=value, separated by commas, each key once, got {text!r}."
            )
        entry[key.strip()] = value.strip()
    return task_settings(entry, f"--task {text!r}", Path())


def task_settings(entry: Mapping[str, Any], where: str, folder: Path) -> TaskSettings:
    """One entry, checked.

    Args:
        entry: fields by name; numbers may be text.
        where: what messages call it.
        folder: that `scans` is relative to.

    Returns:
        The settings.

    Raises:
        InputError: if a key is unknown, or a value not what it should be.
    """
    _refuse_unknown(entry, {field.name for field in fields(TaskSettings)}, where)
    if not str(entry.get("name") or "").strip():
        raise InputError(f"{where}: a name was needed, got none; add name.")
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if value is None:
            continue
        if key in _NUMBERS:
            values[key] = _number(value, _NUMBERS[key], f"{where}: {key}")
        elif key == "scans":
            values[key] = folder / str(value)
        elif key == "roles":
            given = value.split("+") if isinstance(value, str) else value
            values[key] = tuple(map(str, given if isinstance(given, list) else [given]))
        else:
            values[key] = str(value)
    try:
        return TaskSettings(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _mapping(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: a mapping was needed, got {type(entry).__name__}; indent it.")
    return entry


def _refuse_unknown(entry: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in entry:
        if key not in known:
            raise InputError(
                f"{where}: the keys {', '.join(sorted(known))} were needed, got {key!r}; correct "
                "or remove it."
            )


def _number(value: Any, kind: type, where: str) -> Any:
    wanted = "a whole number" if kind is int else "a number"
    try:
        if isinstance(value, bool) or (kind is int and float(value) != int(float(value))):
            raise ValueError
        number = kind(float(value))
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where} must be {wanted}, got {value!r}; correct it.") from None
    most = _MOST.get(where.rpartition(" ")[2], _MOST_NUMBER)
    if not abs(number) <= most:
        raise InputError(f"{where} must be finite and at most {most}, got {number}; correct it.")
    return number
