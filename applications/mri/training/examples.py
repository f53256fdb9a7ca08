"""What an update trains on: slices in rounds of random order, undersampled on the way."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.mri.data import Slice, SliceDataset, fully_sampled
from applications.mri.network.reconstruction import Loss, Network
from applications.mri.network.scan import Scan
from applications.mri.physics.coil_counts import coil_matrix, with_coils
from applications.mri.physics.masks import samples_columns
from applications.mri.physics.operators import fft2c, ifft2c, rss
from applications.mri.sampling import Sampling


class Example(ABC):
    """One slice, with all that was drawn for it."""

    @abstractmethod
    def problem(self, network: Network, loss: Loss) -> tuple[bl.ControlProblem, Tensor]:
        """The control problem that it poses to a network, and its observation."""


@dataclass(frozen=True, eq=False)
class Source:
    """Slices that are undersampled alike.

    Attributes:
        slices: fully sampled; undersampled for self-supervision.
        samplings: one of them, drawn at random, undersamples each slice.
    """

    slices: SliceDataset
    samplings: tuple[Sampling, ...]


class Pool:
    """The slices of all sources, one source after the other, each with its samplings."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """Join the sources."""
        self.sources = tuple(sources)
        self.files = tuple(file for source in self.sources for file in source.slices.files)
        self._ends = list(accumulate(len(source.slices) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> tuple[Slice, tuple[Sampling, ...]]:
        which = bisect_right(self._ends, index)
        source = self.sources[which]
        return source.slices[index - self._ends[which] + len(source.slices)], source.samplings


Draw = Callable[[Slice, tuple[Sampling, ...], torch.Generator], Example]


@dataclass(frozen=True, eq=False)
class FullExample(Example):
    """A fully sampled slice, and the mask that undersamples it.

    Attributes:
        target: coil images of the full data, ``(coils, rows, columns)``.
        reference: their root sum of squares, ``(rows, columns)``.
        mask: boolean, ``(rows, columns)``.
        rows: what of it is trained on.
    """

    target: Tensor
    reference: Tensor
    mask: Tensor
    rows: slice

    def problem(self, network: Network, loss: Loss) -> tuple[bl.ControlProblem, Tensor]:  # noqa: D102
        scan, matrix = self.scan(network)
        target = with_coils(matrix, self.target)[None, :, self.rows]
        return network.training_problem(scan, target, self.reference[None, self.rows], loss)

    def scan(self, network: Network) -> tuple[Scan, Tensor]:
        """What a network sees of it.

        Args:
            network: whose coil count the slice gets.

        Returns:
            The rows that are trained on, and the `coil_matrix` of the measured data.
        """
        kspace = fft2c(self.target) * self.mask
        matrix = coil_matrix(kspace, network.architecture.n_coils)
        scan, rows = network.prepare(with_coils(matrix, kspace)[None], self.mask), self.rows
        if rows != slice(0, self.target.shape[-2]):
            scan = scan.crop_rows(rows.start, rows.stop - rows.start)
        return scan, matrix


def draw_full(
    one: Slice,
    generator: torch.Generator,
    samplings: Sequence[Sampling],
    crop: int = 0,
    *,
    flips: bool = True,
) -> FullExample:
    """An example of a fully sampled slice.

    Args:
        one: the slice.
        generator: of flips, sampling, mask and crop.
        samplings: one of them is drawn.
        crop: image rows to train on, where the mask samples whole columns; 0 takes all.
        flips: whether rows and columns may be reversed.

    Returns:
        The example.

    Raises:
        InputError: if the slice is undersampled.
    """

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    kspace, reference = fully_sampled(one)
    images = ifft2c(kspace)
    if reference.shape != images.shape[-2:]:  # it was cropped
        reference = rss(images)
    for axis in (-2, -1) if flips else ():
        if draw(2):
            images, reference = images.flip(axis), reference.flip(axis)
    n_rows = images.shape[-2]
    mask = samplings[draw(len(samplings))].mask((n_rows, images.shape[-1]), generator)
    rows = slice(0, n_rows)
    if 0 < crop < n_rows and samples_columns(mask):
        top = draw(n_rows - crop + 1)
        rows = slice(top, top + crop)
    return FullExample(images, reference, mask, rows)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a stream of examples stands.

    Attributes:
        generator: state of its generator.
        remaining: slices that are left of the round.
    """

    generator: Tensor
    remaining: tuple[int, ...]


class Examples(Iterator[Example]):
    """Examples without end; every round takes each slice once, in a new random order."""

    def __init__(self, pool: Pool, draw: Draw, seed: int, place: Place | None = None) -> None:
        """Begin at a seed, or go on from a place."""
        self._pool, self._draw = pool, draw
        self._generator = torch.Generator().manual_seed(seed)
        self._remaining: list[int] = []
        if place is not None:
            self._generator.set_state(place.generator)
            self._remaining = list(place.remaining)

    def __next__(self) -> Example:
        if not self._remaining:
            order = torch.randperm(len(self._pool), generator=self._generator)
            self._remaining = order.tolist()
        return self._draw(*self._pool[self._remaining.pop(0)], self._generator)

    @property
    def place(self) -> Place:
        """Where the next example will be drawn from."""
        return Place(self._generator.get_state(), tuple(self._remaining))


def moved(example: Any, device: str) -> Any:
    """An example with its tensors on a device.

    Args:
        example: any record of tensors, such records, and other things.
        device: as torch names it.

    Returns:
        The same record there.
    """
    values = {field.name: getattr(example, field.name) for field in fields(example)}
    there = {n: v.to(device) for n, v in values.items() if isinstance(v, Tensor)}
    within = {n: moved(v, device) for n, v in values.items() if is_dataclass(v)}
    return replace(example, **there, **within)
