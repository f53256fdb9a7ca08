"""The state of a training, saved beside its weights, from which it goes on bit by bit."""

import json
from collections.abc import Mapping
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
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import check_finite, named, restored, stored
from applications.mri.training.draws import Place
from applications.mri.training.validation import Look, Looks
from applications.outputs import Kind

_MAY_CHANGE = {"steps", "seconds", "checkpointing"}  # length, and what leaves the numbers alone


def _is_state(path: Path) -> bool:
    with safe_open(path, framework="pt") as file:
        return "training" in (file.metadata() or {})


STATE = Kind("the state of a training", _is_state)


def state_path(weights: Path) -> Path:
    """Where the state of a training lies that writes `weights`."""
    return weights.with_name(f"{weights.name}.state")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that a training needs to go on as if it had not been interrupted.

    Attributes:
        control: the present weights.
        moments: state of Adam, for each weight in the order of the optimiser.
        place: where the stream of examples stands.
        seconds: spent [s].
        costs: of each update.
        looks: at the validation slices, with the best weights.
    """

    control: bl.PerStep
    moments: dict[int, dict[str, Tensor]]
    place: Place
    seconds: float
    costs: tuple[float, ...]
    looks: Looks


@dataclass(frozen=True, eq=False)
class StateFile:
    """The file of a snapshot: safetensors, with what is no tensor as JSON in its metadata.

    Attributes:
        path: the file.
        network: that is trained.
        conditions: plain values that must be the same when the training goes on, such as settings
            and slices; `steps`, `seconds` and `checkpointing` may differ.
    """

    path: Path
    network: Network
    conditions: Mapping[str, Any]

    def save(self, snapshot: Snapshot) -> None:
        """Writes a file that either is complete or does not replace the one before.

        Args:
            snapshot: all of it.

        Raises:
            InputError: if the file cannot be written.
        """
        best = snapshot.looks.best
        tensors = {f"present.{n}": v for n, v in named(snapshot.control).items()}
        tensors |= {} if best is None else {f"best.{n}": v for n, v in named(best).items()}
        adam = {
            f"{index}.{n}": v for index, one in snapshot.moments.items() for n, v in one.items()
        }
        tensors |= {f"adam.{n}": v for n, v in adam.items()}
        tensors["generator"] = snapshot.place.generator
        content = {
            **self._identity(),
            "complex": [n for n, v in adam.items() if v.is_complex()],
            "remaining": snapshot.place.remaining,
            "seconds": snapshot.seconds,
            "costs": snapshot.costs,
            "looks": [(look.step, look.cost) for look in snapshot.looks.all],
        }
        # Of two names for one storage, safetensors would refuse the second.
        separate = {n: stored(v).clone() for n, v in tensors.items()}
        write_whole(self.path, save(separate, {"training": json.dumps(content)}))

    def load(self) -> Snapshot:
        """Reads what `save` wrote.

        Returns:
            The snapshot.

        Raises:
            InputError: if the file is missing, damaged, no training state, or of a training under
                other conditions; the message lists the differences.
        """
        content, tensors = self._read()
        self._check(content)
        check_finite(self.path, tensors)
        like = self.network.controls()
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _below("adam", tensors).items():
            index, _, part = name.partition(".")
            whole = torch.view_as_complex(value) if name in content["complex"] else value
            moments.setdefault(int(index), {})[part] = whole
        looks = tuple(Look(*one) for one in content["looks"])
        return Snapshot(
            restored(_below("present", tensors), like),
            moments,
            Place(tensors["generator"], tuple(content["remaining"])),
            content["seconds"],
            tuple(content["costs"]),
            Looks(looks, restored(_below("best", tensors), like) if looks else None),
        )

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if not self.path.is_file():
            raise InputError(
                f"{self.path}: the state of an interrupted training was needed, there is none; "
                "train without --resume."
            )
        try:
            with safe_open(self.path, framework="pt") as file:
                content = json.loads((file.metadata() or {})["training"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(
                f"{self.path}: a complete training state was needed ({error}); train without "
                "--resume."
            ) from error
        return content, tensors

    def remove(self) -> None:
        """Removes the file, if there is one: its training has ended."""
        self.path.unlink(missing_ok=True)

    def _identity(self) -> dict[str, Any]:
        same = {n: v for n, v in self.conditions.items() if n not in _MAY_CHANGE}
        return json.loads(
            json.dumps({"architecture": asdict(self.network.architecture), "conditions": same})
        )

    def _check(self, content: dict[str, Any]) -> None:
        for kind, now in self._identity().items():
            was = content[kind]
            differing = sorted(n for n in now | was if now.get(n) != was.get(n))
            if differing:
                listed = "; ".join(f"{n} was {was.get(n)}, is {now.get(n)}" for n in differing)
                raise InputError(
                    f"{self.path}: a training goes on under the same {kind} only: {listed}. "
                    "Restore them, or train without --resume."
                )


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)}
