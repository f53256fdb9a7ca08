"""Trained weights as safetensors files that know their architecture."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.errors import InputError
from applications.inputs import said
from applications.mri.bundled.paths import bundled
from applications.mri.network.architecture import Architecture, narrow, preset_named
from applications.mri.network.reconstruction import Network
from applications.mri.network.tensor_files import (
    read_json,
    read_metadata,
    read_tensors,
    write_tensors,
)
from applications.outputs import Kind

_BYTES = 4  # of a weight
_LARGEST = 4096  # number in an architecture
PRETRAINED = "pretrained"  # what the command line calls the bundled weights
_WHAT, _REMEDY = "a complete safetensors file", "copy it again"
_TRAINED = "use weights that `train` wrote"


def _is_weights(path: Path) -> bool:
    metadata = read_metadata(path, _WHAT, _REMEDY)
    stated = json.loads(metadata["architecture"])  # of other programs a name, or something else
    return "record" in metadata and set(stated) <= {one.name for one in fields(Architecture)}


WEIGHTS = Kind("a file of weights", _is_weights)


class EarlierWeightsWarning(UserWarning):
    """Weights of a network that is still read, and should be used no more."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A network with its weights.

    Attributes:
        network: of the stored architecture.
        control: the weights.
        record: how they were trained, as given to `save_weights`.
    """

    network: Network
    control: bl.PerStep
    record: dict[str, Any]


def save_weights(path: Path | str, trained: Trained) -> None:
    """Writes a file that either is complete or does not appear.

    Args:
        path: the file, replaced if it exists.
        trained: network, weights and record; complex weights are stored as real pairs.

    Raises:
        InputError: if the file cannot be written.
    """
    path = Path(path)
    tensors = {name: stored(value) for name, value in named(trained.control).items()}
    metadata = {
        "architecture": json.dumps(asdict(trained.network.architecture)),
        "record": json.dumps(trained.record),
    }
    write_tensors(path, tensors, metadata)


def pretrained() -> Trained:
    """The weights that come with the package.

    Returns:
        The `light` network, trained on the bundled anatomies at many masks; the record tells how.
    """
    return load_weights(bundled("pretrained.safetensors"))


def weights_named(name: str) -> Trained:
    """Weights as the command line names them.

    Args:
        name: `pretrained`, or a path.

    Returns:
        `pretrained` or `load_weights`.

    Raises:
        InputError: as `load_weights`.
    """
    return pretrained() if name == PRETRAINED else load_weights(name)


def beginning(
    init: str | None, preset: str | None, n_coils: int | None
) -> Callable[[int], Trained]:
    """The weights that trainings begin with.

    Args:
        init: stored ones, see `weights_named`; None: new ones.
        preset: of new ones, `light` unless named; stored ones must be of it if it is named.
        n_coils: of new ones, 8 unless stated, none for presets that take any number; stored ones
            must be for it if it is stated.

    Returns:
        The weights for a seed.

    Raises:
        InputError: if the stored weights are of another architecture; the difference is listed.
    """
    if init is None:
        architecture = preset_named(preset or "light", n_coils)

        def new(seed: int) -> Trained:
            network = Network(architecture, seed)
            return Trained(network, network.controls(), {})

        return new
    kept = weights_named(init)
    found = kept.network.architecture
    asked = found if preset is None else preset_named(preset, found.n_coils or None)
    if n_coils is not None:
        asked = replace(asked, n_coils=n_coils)
    if asked != found:
        was, now = asdict(found), asdict(asked)
        listed = "; ".join(f"{n} is {was[n]}, not {now[n]}" for n in now if was[n] != now[n])
        raise InputError(
            f"{init}: weights of the network that --preset and --coils name were needed, these are "
            f"of another architecture: {listed}; leave those options out, or --init."
        )
    return lambda _seed: kept


def load_weights(path: Path | str) -> Trained:
    """Reads what `save_weights` wrote.

    Args:
        path: the file.

    Returns:
        Network, weights and record.

    Raises:
        InputError: if the file is missing, damaged, not of this application, its tensors are not
            those of its architecture, or values are not finite.

    Warns:
        EarlierWeightsWarning: if they are of an earlier `light`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: a weights file was needed, there is none; train one first.")
    metadata = read_metadata(path, _WHAT, _REMEDY)
    record = read_json(path, "record", metadata.get("record", "{}"), _TRAINED)
    if not isinstance(record, dict):
        raise InputError(
            f"{path}: metadata 'record' must say how the weights were trained, by name, got "
            f"{type(record).__name__}; use weights that `train` wrote."
        )
    try:
        stated = read_json(path, "architecture", metadata["architecture"], _TRAINED)
        architecture = _architecture(stated)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: metadata 'architecture' must describe a network of this version "
            f"({said(error)}); use weights that `train` wrote."
        ) from error
    # What it describes is built only where the file is large enough to hold its weights.
    needed, size = architecture.least_weights * _BYTES, path.stat().st_size
    if needed > size:
        raise InputError(
            f"{path}: weights of the stored architecture were needed, more than {needed} bytes, "
            f"the file has {size}; use weights that `train` wrote."
        )
    network = Network(architecture)
    control = network.controls()
    tensors = read_tensors(path, _WHAT, _REMEDY)
    check_kinds(path, tensors, control)
    check_finite(path, tensors)
    if architecture.n_coils and architecture == narrow(architecture.n_coils):
        warnings.warn(
            f"{path}: these are weights of `light` as it was before: they erase signal of another "
            "phase than its surroundings; use the bundled ones, or train anew.",
            EarlierWeightsWarning,
            stacklevel=2,
        )
    return Trained(network, restored(tensors, control), record)


def _architecture(stated: Any) -> Architecture:
    """An architecture, each field of which is of its kind."""
    if not isinstance(stated, dict):
        raise TypeError(f"sizes by name were needed, got {type(stated).__name__}")
    kinds = {one.name: type(one.default) for one in fields(Architecture)}
    for name, value in stated.items():
        kind = kinds.get(name)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if kind is not None and (not fits or not abs(value) <= _LARGEST):
            raise ValueError(
                f"{name} must be {kind.__name__}, at most {_LARGEST}, got {str(value)[:80]}"
            )
    return Architecture(**stated)


def check_kinds(path: Path, tensors: Mapping[str, Tensor], control: bl.PerStep) -> None:
    """Refuses tensors of a file that are not those of a network.

    Args:
        path: the file, for the message.
        tensors: by name, as stored.
        control: weights of the network.

    Raises:
        InputError: naming the first.
    """
    expected = {n: _kind(stored(v)) for n, v in named(control).items()}
    found = {n: _kind(v) for n, v in tensors.items()}
    if expected != found:
        differing = sorted(n for n in expected | found if expected.get(n) != found.get(n))
        first = differing[0]
        raise InputError(
            f"{path}: {len(differing)} tensors differ from the stored architecture, {first!r} must "
            f"be {expected.get(first)}, got {found.get(first)}; use weights that `train` wrote."
        )


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors of a file that are not finite.

    Args:
        path: the file, for the message.
        tensors: by name.

    Raises:
        InputError: naming the first.
    """
    for name, value in tensors.items():
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise InputError(
                f"{path}: weights must be finite, {name!r} holds {bad} of {value.numel()} values "
                "that are not; use other weights, or train again at a lower learning rate."
            )


def named(control: bl.PerStep) -> dict[str, Tensor]:
    """Weights by the names that files give them.

    Args:
        control: weights of a network.

    Returns:
        The tensors, not copied.
    """
    found = {f"initial.{n}": v for n, v in control.initial.items()}
    for t, step in enumerate(control.steps, start=1):
        found |= {f"step{t}.{n}": v for n, v in step.items()}
    return found


def restored(tensors: Mapping[str, Tensor], like: bl.PerStep) -> bl.PerStep:
    """The inverse of `named`, for tensors as they come from a file.

    Args:
        tensors: by name; others than weights may be among them.
        like: weights of the same network.

    Returns:
        The weights.
    """
    values = {
        n: torch.view_as_complex(tensors[n])
        if v.is_complex() and not tensors[n].is_complex()
        else tensors[n]
        for n, v in named(like).items()
    }
    steps = [{n: values[f"step{t}.{n}"] for n in step} for t, step in enumerate(like.steps, 1)]
    initial = {n: values[f"initial.{n}"] for n in like.initial}
    return bl.PerStep(steps, initial)


def stored(value: Tensor) -> Tensor:
    """A tensor as files hold it: complex numbers as real pairs."""
    real = torch.view_as_real(value) if value.is_complex() else value
    return real.detach().cpu().contiguous()


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {[*value.shape]}"


def on_device(control: bl.PerStep, device: str, *, copy: bool = False) -> bl.PerStep:
    """Weights on a device.

    Args:
        control: weights of a network.
        device: as torch names it.
        copy: whether they share no memory with `control` even if they are there already.

    Returns:
        The weights.
    """

    def moved(part: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: v.detach().to(device, copy=copy) for n, v in part.items()}

    return bl.PerStep([moved(step) for step in control.steps], moved(control.initial))
