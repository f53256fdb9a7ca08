"""Which slices are trained on, and when: rounds in random order, or minibatches by their step.

Both draw from sources, a source being slices that are undersampled alike. A training of the weights
alone goes through all slices in rounds, and a generator remembers where it is. Where sweeps through
the training ask for a step again, a minibatch is a function of its step.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.data import SliceDataset
from applications.mri.network.reconstruction import Network
from applications.mri.sampling import Sampling
from applications.mri.simulation.phantoms import ROLES
from applications.mri.training.examples import (
    Example,
    FullExample,
    PreparedExample,
    draw_full,
    moved,
    together,
)


@dataclass(frozen=True)
class TargetNoise:
    """Complex noise on what a training compares with, to study bad references.

    Attributes:
        level: standard deviation, in units of the largest magnitude of the slice.
        place: with the number of the slice it seeds the noise, which is the same each time.
    """

    level: float
    place: tuple[int, ...]

    def of(self, target: Tensor, index: int) -> Tensor:
        """The noise of a slice, shape and dtype of its ``target``."""
        generator = _generator(*self.place, index)
        noise = torch.randn(target.shape, dtype=target.dtype, generator=generator)
        return self.level * target.abs().max() * noise


@dataclass(frozen=True, eq=False)
class Source:
    """Slices that are undersampled alike.

    Attributes:
        slices: fully sampled; undersampled for self-supervision.
        samplings: one of them, drawn at random, undersamples each slice.
        noise: on what the training compares with, or None.
    """

    slices: SliceDataset
    samplings: tuple[Sampling, ...]
    noise: TargetNoise | None = None

    def example(
        self, index: int, generator: torch.Generator, crop: int = 0, *, flips: bool = True
    ) -> FullExample:
        """`draw_full` of a slice, with its noise.

        Args:
            index: of the slice.
            generator: of what is drawn.
            crop: image rows, 0: all.
            flips: whether rows and columns may be reversed.

        Returns:
            The example.

        Raises:
            InputError: if the slice is undersampled.
        """
        drawn = draw_full(self.slices[index], generator, self.samplings, crop, flips=flips)
        if self.noise is None:
            return drawn
        return replace(drawn, noise=self.noise.of(drawn.target, index))


class Pool:
    """The slices of all sources, one source after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """Join the sources."""
        self.sources = tuple(sources)
        self._ends = list(accumulate(len(source.slices) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> tuple[Source, int]:
        """The source of a slice, and the number of the slice in it."""
        which = bisect_right(self._ends, index)
        source = self.sources[which]
        return source, index - self._ends[which] + len(source.slices)


Draw = Callable[[Source, int, torch.Generator], Example]


class Rounds(Iterator[Example]):
    """Examples without end; every round takes each slice once, in a new random order."""

    def __init__(self, pool: Pool, draw: Draw, seed: int) -> None:
        """Begin at a seed."""
        self._pool, self._draw = pool, draw
        self._generator = torch.Generator().manual_seed(seed)
        self._remaining: list[int] = []

    def __next__(self) -> Example:
        if not self._remaining:
            order = torch.randperm(len(self._pool), generator=self._generator)
            self._remaining = order.tolist()
        return self._draw(*self._pool[self._remaining.pop(0)], self._generator)

    def state_dict(self) -> dict[str, Any]:
        """Where the next example will be drawn from."""
        return {"generator": self._generator.get_state(), "remaining": self._remaining}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Draw from there.

        Args:
            state: what `state_dict` gave.
        """
        self._generator.set_state(state["generator"])
        self._remaining = [*state["remaining"]]


Batch = tuple[tuple[PreparedExample, ...], ...]  # by source; of a source one example a matrix size


@dataclass(frozen=True, eq=False)
class Minibatches:
    """Draws slices of every source, anew for each step.

    Attributes:
        network: whose coil count the scans get; see `coil_counts`.
        sources: in the order of the losses.
        role: of the slices, which tells the draws of one seed apart.
        size: slices a source.
        crop: image rows of a slice that are kept [pixels], 0: all; only where the mask samples
            whole columns, as in `TrainingSettings`.
        seed: of slices, flips, masks and crops.
        kept: minibatches remembered, since sweeps ask for a step again.
        device: where they are wanted, as torch names it.

    Raises:
        InputError: if `size` is not positive or `crop` negative.
    """

    network: Network
    sources: Sequence[Source]
    role: str
    size: int = 1
    crop: int = 0
    seed: int = 0
    kept: int = 1
    device: str = "cpu"
    draw: Callable[[int], Batch] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.size < 1 or self.crop < 0:
            raise InputError(
                f"a batch must have at least 1 slice and crops >= 0 rows, got {self.size} and "
                f"{self.crop}."
            )
        object.__setattr__(self, "draw", lru_cache(self.kept)(self._draw))

    def _draw(self, step: int) -> Batch:
        return tuple(self.of_source(i, step) for i in range(len(self.sources)))

    def of_source(self, number: int, step: int) -> tuple[PreparedExample, ...]:
        """The minibatch of one source.

        Args:
            number: of the source.
            step: the step.

        Returns:
            One example a matrix size, in the order in which sizes were drawn.
        """
        source = self.sources[number]
        generator = _generator(self.seed, ROLES.index(self.role), number, step)
        chosen = torch.randperm(len(source.slices), generator=generator)[: self.size]
        drawn = [source.example(int(i), generator, self.crop) for i in chosen]
        ready = together([one.prepared(self.network) for one in drawn])
        return tuple(moved(one, self.device) for one in ready)


def _generator(*numbers: int) -> torch.Generator:
    """A generator for a place in a table, independent of those of other places."""
    state = np.random.SeedSequence([*numbers]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
