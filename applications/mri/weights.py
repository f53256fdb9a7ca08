"""Trained weights as safetensors files that know their architecture."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import bilevel as bl
from applications.errors import InputError
from applications.files import write_whole
from applications.mri.network import Architecture
from applications.mri.reconstruction import Network


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
    tensors = {
        name: torch.view_as_real(value).contiguous() if value.is_complex() else value.contiguous()
        for name, value in named(trained.control).items()
    }
    metadata = {
        "architecture": json.dumps(asdict(trained.network.architecture)),
        "record": json.dumps(trained.record),
    }
    write_whole(path, save(tensors, metadata))


def load_weights(path: Path | str) -> Trained:
    """Reads what `save_weights` wrote.

    Args:
        path: the file.

    Returns:
        Network, weights and record.

    Raises:
        InputError: if the file is missing, damaged, not of this application, or its tensors are
            not those of its architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: a weights file was needed, there is none; train one first.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: a complete safetensors file was needed ({error}); copy it again."
        ) from error
    try:
        architecture = Architecture(**json.loads(metadata["architecture"]))
        record = json.loads(metadata.get("record", "{}"))
        network = Network(architecture)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: metadata 'architecture' must describe a network of this version ({error}); "
            "use weights that `train` wrote."
        ) from error
    control = network.controls()
    template = named(control)
    expected = {n: _stored_kind(v) for n, v in template.items()}
    found = {n: _stored_kind(v) for n, v in stored.items()}
    if expected != found:
        differing = sorted(n for n in expected | found if expected.get(n) != found.get(n))
        first = differing[0]
        raise InputError(
            f"{path}: {len(differing)} tensors differ from the stored architecture, {first!r} must "
            f"be {expected.get(first)}, got {found.get(first)}; use weights that `train` wrote."
        )
    values = {
        n: torch.view_as_complex(stored[n]) if v.is_complex() else stored[n]
        for n, v in template.items()
    }
    steps = [{n: values[f"step{t}.{n}"] for n in step} for t, step in enumerate(control.steps, 1)]
    initial = {n: values[f"initial.{n}"] for n in control.initial}
    return Trained(network, bl.PerStep(steps, initial), record)


def _stored_kind(value: Tensor) -> str:
    real = torch.view_as_real(value) if value.is_complex() else value
    return f"{str(real.dtype).removeprefix('torch.')} {[*real.shape]}"


def named(control: bl.PerStep) -> dict[str, Tensor]:
    """The weights by the name they have in a file."""
    found = {f"initial.{n}": v for n, v in control.initial.items()}
    for t, step in enumerate(control.steps, start=1):
        found |= {f"step{t}.{n}": v for n, v in step.items()}
    return found
