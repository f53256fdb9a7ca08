"""A network adapted to the scan itself, without a reference: a few steps from trained weights."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

import bilevel as bl
from applications.errors import InputError
from applications.mri.data import UnusableSliceError
from applications.mri.network.held_out import certified, held_out
from applications.mri.network.reconstruction import Loss
from applications.mri.network.weights import Trained
from applications.mri.physics.coil_counts import fitted
from applications.mri.training.self_supervised import SelfSupervision, SplitExample
from bilevel.errors import DivergenceError

_LOOKED_AT = 3  # slices, before and after
_RATE = 3e-4


@dataclass(frozen=True, eq=False)
class Adaptation:
    """What came of it.

    Attributes:
        trained: network and weights: adapted ones, or those before where these are better.
        before: mean error where samples were held out, of the slices looked at.
        after: the same of the adapted weights; infinite where the steps diverged.
    """

    trained: Trained
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether the adapted weights are the better ones."""
        return self.after < self.before

    def __str__(self) -> str:
        """What came of it, in words."""
        errors = f"held-out error {self.before:.3f} to {self.after:.3f}"
        return f"Adapted to the scan: {errors}; {'kept' if self.kept else 'not kept'}."


def adapted(
    trained: Trained, slices: Sequence[tuple[Tensor, ...]], steps: int, seed: int = 0
) -> Adaptation:
    """Steps of self-supervised training on the slices of a scan.

    The samples that `held_out` holds out of a slice are never trained on, so that the errors before
    and after are of samples that neither saw.

    Args:
        trained: where to begin.
        slices: k-space ``(coils, rows, columns)`` and mask ``(rows, columns)`` of each, and what
            its coils are calibrated by if that is no part of the image, on the device of the
            weights; read when they are asked for.
        steps: of Adam, one slice each.
        seed: of slices and splits.

    Returns:
        The better weights, and both errors.

    Raises:
        InputError: if there is no step to make, or no slice to make it on.
        UnusableSliceError: if no slice can be used; those that cannot are left out.
    """
    if steps < 1 or not slices:
        raise InputError(
            f"at least one step and one slice were needed to adapt, got {steps} and {len(slices)}."
        )
    network = trained.network
    loss = Loss(1.0, 0.0 if network.architecture.gains else 1.0, 0.0)
    solver = bl.ControlSolver(
        lambda example: example.problem(network, loss),
        lambda leaves: torch.optim.Adam(leaves, _RATE, betas=(0.9, 0.99)),
    )
    usable = _Usable(slices)
    looked_at = usable.spread(_LOOKED_AT)
    before = fmean(_error(trained, *each) for each in looked_at)
    try:
        examples = _Examples(usable, steps, seed)
        found = solver.solve(trained.control, steps=steps, batches=examples).control
    except DivergenceError:
        return Adaptation(trained, before, math.inf)
    better = replace(trained, control=found)
    after = fmean(_error(better, *each) for each in looked_at)
    return Adaptation(better if after < before else trained, before, after)


class _Usable:
    """The slices that are neither zero nor damaged, as far as they have been looked at."""

    def __init__(self, slices: Sequence[tuple[Tensor, ...]]) -> None:
        self._slices, self._left = slices, [*range(len(slices))]

    def __len__(self) -> int:
        return len(self._left)

    def at(self, place: int) -> tuple[Tensor, ...] | None:
        """The slice at a place among those that are left; None if it has just been left out."""
        try:
            return self._slices[self._left[place]]
        except UnusableSliceError:
            del self._left[place]
            if not self._left:
                raise
            return None

    def spread(self, n: int) -> list[tuple[Tensor, ...]]:
        """Some slices from the whole of the scan."""
        found, k = [], 0
        while k < min(n, len(self)):
            one = self.at((2 * k + 1) * len(self) // (2 * min(n, len(self))))
            if one is None:  # with one slice less the others lie elsewhere
                found, k = [], 0
            else:
                found, k = [*found, one], k + 1
        return found

    def drawn(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """A slice at random."""
        while True:
            one = self.at(int(torch.randint(len(self), (), generator=generator)))
            if one is not None:
                return one


@dataclass(frozen=True, eq=False)
class _Examples:
    """Slices in random order, split anew each time; read one at a time."""

    slices: _Usable
    steps: int
    seed: int

    def __iter__(self) -> Iterator[SplitExample]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            kspace, mask, *calibration = self.slices.drawn(generator)
            known, _ = held_out(mask)
            split = SelfSupervision().split(known.cpu(), generator)
            given, held = (one.to(mask.device) for one in split)
            yield SplitExample(kspace * known, given, held, *calibration)


def _error(
    trained: Trained, kspace: Tensor, mask: Tensor, calibration: Tensor | None = None
) -> float:
    n_coils = trained.network.architecture.coils_of(len(kspace))
    given, extra = fitted(kspace, calibration, n_coils)
    return certified(trained, given, mask, extra).error
