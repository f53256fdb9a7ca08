"""Training in bfloat16 on a GPU: convolutions in half the bits, transforms and data terms in all.

The state stays complex64 and the weights float32, so that the Fourier transforms, the step towards
the data, the loss, the multipliers between phases, and Adam are as they were; only what happens
within a convolutional net is rounded. bfloat16 has the range of float32, so that no loss is scaled.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch

import bilevel as bl
from applications.errors import InputError


class Precision(StrEnum):
    """What the convolutions of a training compute in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class Autocast(bl.Dynamics):
    """A dynamics whose steps run under `torch.autocast` to bfloat16.

    A step that is pulled back is evaluated again under the same rules.

    Attributes:
        inner: the dynamics.
        device_type: of its tensors: `"cuda"`, or `"cpu"` to check it without a GPU.
    """

    inner: bl.Dynamics
    device_type: str

    def init(self, observation: Any, control: Any) -> Any:  # noqa: D102
        with torch.autocast(self.device_type, torch.bfloat16):
            return self.inner.init(observation, control)

    def step(self, state: Any, control: Any, t: int) -> Any:  # noqa: D102
        with torch.autocast(self.device_type, torch.bfloat16):
            return self.inner.step(state, control, t)

    def readout(self, state: Any) -> Any:  # noqa: D102
        return self.inner.readout(state)


def check_device(device: str, precision: Precision = Precision.FLOAT32) -> None:
    """Refuse a device that is not there, and a precision that it does not gain from.

    Args:
        device: as torch names it.
        precision: of the convolutions.

    Raises:
        InputError: if it is neither the CPU nor a GPU of this machine, or bfloat16 was asked for on
            a CPU, most of which only emulate it.
    """
    kind, colon, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (kind == "cpu" and colon):
        raise InputError(f"device must be 'cpu' or 'cuda', got {device!r}; choose one of them.")
    if kind == "cpu" and precision is not Precision.FLOAT32:
        raise InputError(
            f"precision {precision.value!r} needs a GPU, device is 'cpu', where it is slower than "
            "float32; leave the precision at 'float32', or choose device 'cuda'."
        )
    n_devices = torch.cuda.device_count()
    if kind == "cuda" and colon and not number.isdecimal():
        raise InputError(f"device must be 'cuda' or 'cuda:0' and the like, got {device!r}.")
    if kind == "cuda" and int(number or 0) >= n_devices:
        raise InputError(
            f"device {device!r} needs a GPU, torch sees {n_devices} of them; choose device 'cpu', "
            "or install the torch that fits the driver."
        )


def in_precision(
    problem: bl.ControlProblem, precision: Precision, device: str
) -> bl.ControlProblem:
    """The problem with its phases in a precision.

    Args:
        problem: whose costs stay as they are.
        precision: of the convolutions.
        device: where its tensors are.

    Returns:
        The problem.
    """
    if precision is Precision.FLOAT32:
        return problem
    return replace(problem, dynamics=Autocast(problem.dynamics, torch.device(device).type))
