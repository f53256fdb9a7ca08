r"""Training on undersampled scans alone, by holding out a part of what was measured.

The sampled positions :math:`\Omega` are split at random, anew for each update, into two disjoint
sets. :math:`\Theta` is the data that the network receives, :math:`\Lambda` is where its k-space is
compared with what was measured; no reference and no unsampled position enters.

Yaman, Hosseini, Moeller, Ellermann, Ugurbil & Akcakaya 2020, Self-supervised learning of
physics-guided reconstruction neural networks without fully sampled reference data, Magnetic
Resonance in Medicine 84(6), DOI 10.1002/mrm.28378.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.errors import InputError
from applications.mri.data import Slice, implied_mask
from applications.mri.network.reconstruction import Loss, Network
from applications.mri.physics.coil_counts import coil_matrix, with_coils
from applications.mri.physics.operators import fft2c, rss
from applications.mri.training.examples import Example
from applications.settings import check_positive


@dataclass(frozen=True)
class SelfSupervision:
    r"""How sampled positions are split.

    Attributes:
        share: of the sampled positions outside the centre that are held out, in (0, 1).
        centre: side of the central square that stays with the network [positions]; its calibration
            and its low-resolution phase are made of it.
        width: of the Gaussian that draws the positions held out, as a share of the matrix.

    Raises:
        InputError: if a field is out of range.
    """

    share: float = 0.4
    centre: int = 24
    width: float = 0.25

    def __post_init__(self) -> None:
        """Check the fields."""
        if not 0 < self.share < 1:
            raise InputError(
                f"share must lie in (0, 1), got {self.share}; the network needs one part of the "
                "data, the loss the other."
            )
        if self.centre < 0:
            raise InputError(f"centre must be >= 0 positions, got {self.centre}.")
        check_positive(self, "width")

    def split(self, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        r"""The sets :math:`\Theta` and :math:`\Lambda`, disjoint, together the mask.

        Args:
            mask: boolean, shape ``(rows, columns)``.
            generator: draws the positions held out.

        Returns:
            Two boolean masks, the shape of ``mask``; the first holds the centre.

        Raises:
            InputError: if less than two sampled positions lie outside the centre.
        """
        rows, columns = (
            (torch.arange(n, dtype=torch.float64) - n // 2) for n in (mask.shape[0], mask.shape[1])
        )
        half = self.centre / 2
        central = ((-half <= rows) & (rows < half))[:, None] & (
            (-half <= columns) & (columns < half)
        )
        outside = (mask & ~central).flatten().nonzero()[:, 0]
        n_held = min(max(round(self.share * len(outside)), 1), len(outside) - 1)
        if n_held < 1:
            raise InputError(
                f"at least two sampled positions outside the central {self.centre} x "
                f"{self.centre} were needed, the mask has {len(outside)}; take a smaller centre."
            )
        squares = (rows / len(rows))[:, None] ** 2 + (columns / len(columns)) ** 2
        density = torch.exp(-squares / (2 * self.width**2)).flatten()[outside]
        held = torch.zeros_like(mask).flatten()
        held[outside[torch.multinomial(density, n_held, generator=generator)]] = True
        held = held.reshape(mask.shape)
        return mask & ~held, held


@dataclass(frozen=True, eq=False)
class SplitExample(Example):
    r"""An undersampled slice whose sampled positions are split.

    Attributes:
        kspace: complex, ``(coils, rows, columns)``, zeros where nothing was measured.
        given: :math:`\Theta`, boolean, ``(rows, columns)``.
        held: :math:`\Lambda`, boolean, ``(rows, columns)``.
        calibration: what the coils are calibrated by where that is no part of the image, see
            `scan.prepared`; None: the centre of ``kspace``.
    """

    kspace: Tensor
    given: Tensor
    held: Tensor
    calibration: Tensor | None = None

    def problem(self, network: Network, loss: Loss) -> tuple[bl.ControlProblem, Any]:
        r"""The control problem of the positions held out.

        The difference :math:`d(u) = P_\Lambda (F u - f)` is measured as in the reference, by
        :math:`|d| = \|d\|_2 / \|P_\Lambda f\|_2 + \|d\|_1 / \|P_\Lambda f\|_1`, and the cost is

        .. math:: a\,|d(u(T))| + b\,\big||J u(T)| - RSS(u(T))\big| + c\,|d(u(0))|.

        The middle term teaches J, which no k-space sees, to combine the coils.

        Args:
            network: to train.
            loss: a, b and c are those of `Loss`.

        Returns:
            What `bilevel.ControlSolver` takes from `build`.
        """
        matrix = coil_matrix(
            self.kspace * self.given, network.architecture.coils_of(len(self.kspace))
        )
        kspace = with_coils(matrix, self.kspace)
        extra = None
        if self.calibration is not None:
            extra = with_coils(matrix, self.calibration)[None]
        scan = network.prepare(kspace[None], self.given, extra)
        wanted = kspace * self.held / scan.scale
        norms = [float(torch.linalg.vector_norm(wanted, p)) for p in (2, 1)]

        def misfit(state: Any) -> Tensor:
            difference = fft2c(network.coil_images(state)) * self.held - wanted
            each = zip((2, 1), norms, strict=True)
            return sum(
                (torch.linalg.vector_norm(difference, p) / norm for p, norm in each),
                torch.zeros((), device=wanted.device),
            )

        def terminal(state: Any, control: bl.PerStep) -> Tensor:
            plain = rss(network.coil_images(state))
            combined = (network.image(scan, state, control) - plain).abs().mean()
            return loss.state * misfit(state) + loss.combined * combined

        def running(state: Any, _control: object, t: int) -> Tensor:
            if t != 1:
                return torch.zeros((), device=wanted.device)
            return loss.initial * misfit(state)

        dynamics, horizon = network.dynamics(scan), network.architecture.n_phases
        return bl.ControlProblem(dynamics, terminal, horizon, running), network.observation(scan)


def draw_split(
    one: Slice, generator: torch.Generator, supervision: SelfSupervision
) -> SplitExample:
    """An example of an undersampled slice.

    Args:
        one: the slice; its mask is the file's, or where any coil is not 0.
        generator: of the split.
        supervision: how to split.

    Returns:
        The example.

    Raises:
        InputError: if the slice leaves nothing out, nothing can be held out, or what is held out
            is all 0.
    """
    mask = implied_mask(one.kspace) if one.mask is None else one.mask
    if bool(mask.all()):
        raise InputError(
            f"{one.path}: an undersampled scan was needed to train self-supervised, slice "
            f"{one.index} leaves nothing out; train on it with its reference instead."
        )
    kspace = torch.where(mask, one.kspace, 0)
    try:
        given, held = supervision.split(mask, generator)
    except InputError as error:
        raise InputError(f"{one.path}: {error}") from error
    if not bool((kspace * held).any()):
        raise InputError(
            f"{one.path}: k-space of slice {one.index} is 0 wherever it was held out; the mask of "
            "the file does not fit, or the slice is empty: leave it out."
        )
    return SplitExample(kspace, given, held, one.calibration)
