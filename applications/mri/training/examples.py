"""What is trained on: slices, undersampled on the way, as control problems for a network."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.mri.data import Slice, fully_sampled
from applications.mri.network.reconstruction import Loss, Network
from applications.mri.network.scan import Scan
from applications.mri.physics.coil_counts import coil_matrix, with_coils
from applications.mri.physics.masks import samples_columns
from applications.mri.physics.operators import fft2c, ifft2c, rss
from applications.mri.sampling import Sampling


class Example(ABC):
    """One slice or several, with all that was drawn for them."""

    @abstractmethod
    def problem(self, network: Network, loss: Loss) -> tuple[bl.ControlProblem, Any]:
        """The control problem that it poses to a network, and its observation."""


@dataclass(frozen=True, eq=False)
class PreparedExample(Example):
    """Slices of one matrix size, undersampled and ready for a network.

    Attributes:
        scan: of the network.
        target: coil images of the full data, ``(batch, coils, rows, columns)``.
        reference: magnitude images, ``(batch, rows, columns)``.
    """

    scan: Scan
    target: Tensor
    reference: Tensor

    def problem(self, network: Network, loss: Loss) -> tuple[bl.ControlProblem, Any]:  # noqa: D102
        return network.training_problem(self.scan, self.target, self.reference, loss)


@dataclass(frozen=True, eq=False)
class FullExample(Example):
    """A fully sampled slice, and the mask that undersamples it.

    Attributes:
        target: coil images of the full data, ``(coils, rows, columns)``.
        reference: their root sum of squares, ``(rows, columns)``.
        mask: boolean, ``(rows, columns)``.
        rows: what of it is trained on.
        noise: added to the coil images that the training compares with, not to what is measured;
            their root sum of squares is then the reference. None: no noise.
    """

    target: Tensor
    reference: Tensor
    mask: Tensor
    rows: slice
    noise: Tensor | None = None

    def problem(self, network: Network, loss: Loss) -> tuple[bl.ControlProblem, Any]:  # noqa: D102
        return self.prepared(network).problem(network, loss)

    def prepared(self, network: Network) -> PreparedExample:
        """The rows that are trained on, ready for a network.

        Args:
            network: whose coil count the slice gets, by the `coil_matrix` of the measured data.

        Returns:
            A batch of one.
        """
        kspace = fft2c(self.target) * self.mask
        matrix = coil_matrix(kspace, network.architecture.coils_of(len(kspace)))
        scan, rows = network.prepare(with_coils(matrix, kspace)[None], self.mask), self.rows
        if rows != slice(0, self.target.shape[-2]):
            scan = scan.crop_rows(rows.start, rows.stop - rows.start)
        target, reference = self.target, self.reference
        if self.noise is not None:
            target = target + self.noise
            reference = rss(target)
        target = with_coils(matrix, target)[None, :, rows]
        return PreparedExample(scan, target, reference[None, rows])


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
    images, measured = ifft2c(kspace), one.measured
    if reference.shape != images.shape[-2:]:  # it was cropped
        reference = rss(images)
    for axis in (-2, -1) if flips else ():
        if draw(2):
            images, reference = images.flip(axis), reference.flip(axis)
            # Frequency k becomes -k; the zero frequency, at n // 2, stays where it is.
            measured = measured.flip(axis).roll(1 - measured.shape[axis] % 2, axis)
    n_rows = images.shape[-2]
    mask = samplings[draw(len(samplings))].mask((n_rows, images.shape[-1]), generator)
    mask = mask & measured  # without the zeros that scanners pad k-space by
    rows = slice(0, n_rows)
    if 0 < crop < n_rows and samples_columns(mask):
        top = draw(n_rows - crop + 1)
        rows = slice(top, top + crop)
    return FullExample(images, reference, mask, rows)


def together(examples: Sequence[PreparedExample]) -> tuple[PreparedExample, ...]:
    """Examples of one matrix size and coil count put together, in the order of first appearance.

    Args:
        examples: of any sizes.

    Returns:
        One a size.
    """
    sizes: dict[torch.Size, list[PreparedExample]] = {}
    for one in examples:
        sizes.setdefault(one.target.shape[-3:], []).append(one)
    return tuple(_joined(alike) for alike in sizes.values())


def _joined(examples: Sequence[PreparedExample]) -> PreparedExample:
    if len(examples) == 1:
        return examples[0]
    scans = [vars(one.scan) for one in examples]
    # Options of the architecture are the same for all: a field is None in every scan or in none.
    scan = {
        name: None if scans[0][name] is None else torch.cat([scan[name] for scan in scans])
        for name in scans[0]
    }
    return PreparedExample(
        replace(examples[0].scan, **scan),
        torch.cat([one.target for one in examples]),
        torch.cat([one.reference for one in examples]),
    )


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
