"""The network as a `bilevel.Dynamics`: what enters it, what it is trained for, what it gives."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.errors import InputError
from applications.mri.network.architecture import Architecture
from applications.mri.network.certificate import SliceCertificate
from applications.mri.network.layers import to_complex, to_planes
from applications.mri.network.modules import InitialNet, Phase
from applications.mri.network.scan import Scan, prepared
from applications.mri.network.wavelet_phases import Begin, WaveletPhase
from applications.mri.physics.l1_spirit import l1_spirit
from applications.mri.physics.measured import Measured
from applications.mri.physics.operators import ifft2c, rss, sample

NETWORK, L1_SPIRIT = "network", "l1-spirit"  # methods


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What the network makes of a scan, in the units of the scan.

    Attributes:
        image: |J u(T)|, or what the option `rss_skip` makes of it, ``(batch, rows, columns)``.
        coil_images: u(T), ``(batch, coils, rows, columns)``.
        data_residual: |P F u(T) - f| / |f|, ``(batch,)``; above 1 nothing at all would be nearer to
            what was measured.
        certificate: of one slice that was checked, else None.
        method: what the images are of, `network` or `l1-spirit`.
    """

    image: Tensor
    coil_images: Tensor
    data_residual: Tensor
    certificate: SliceCertificate | None = None
    method: str = NETWORK


@dataclass(frozen=True)
class Loss:
    r"""Weights of the training loss, means over pixels.

    .. math:: a\,|u(T) - u^*|^2 + b\,\big||J u(T)| - RSS(u^*)\big| + c\,|u(0) - u^*|

    The term in u(0) is the running cost at t = 1. The defaults are the paper's. Phases that shrink
    wavelets take each mean relative to that of what they start from, so that slices whose errors
    are small count as much as others.

    Attributes:
        state: a.
        combined: b.
        initial: c.
    """

    state: float = 1.0
    combined: float = 1.0
    initial: float = 0.01

    @classmethod
    def written(cls, text: str) -> "Loss":
        """The weights of a text, three numbers separated by commas.

        Args:
            text: such as ``1,1,0.01``.

        Returns:
            The weights.

        Raises:
            InputError: if it is not three finite numbers >= 0.
        """
        try:
            weights = [float(one) for one in text.split(",")]
        except ValueError:
            weights = []
        if len(weights) != len(fields(cls)) or not all(0 <= one < math.inf for one in weights):
            raise InputError(
                "the weights of the loss must be three numbers >= 0, such as 1,1,0.01, got "
                f"{text!r}."
            )
        return cls(*weights)


@dataclass(frozen=True, eq=False)
class Network:
    """The dynamics of an architecture, and how scans enter and images leave it.

    Attributes:
        architecture: sizes and options.
        seed: of the initial weights.
    """

    architecture: Architecture
    seed: int = 0
    _phases: bl.Phases = field(init=False, repr=False)
    _combine: Callable[..., Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Draw the initial weights; torch's defaults do not matter, and its generator stays."""
        generator = torch.Generator().manual_seed(self.seed)
        a = self.architecture
        combine = None
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            if a.gains:
                initial = Begin()
                phases = [WaveletPhase(a, number, generator) for number in range(a.n_phases)]
            else:
                initial = InitialNet(a, generator)
                phases = [Phase(a, generator) for _ in range(a.n_phases)]
                combine = phases[-1].combine
            for one in (initial, *phases):
                one.float()
        object.__setattr__(self, "_phases", bl.Phases(phases, initial))
        if combine is not None:
            object.__setattr__(self, "_combine", bl.functional(combine)[1])

    @property
    def phases(self) -> bl.Phases:
        """The modules, with the initial weights."""
        return self._phases

    def controls(self) -> bl.PerStep:
        """The initial weights, theta_0 to theta_T."""
        return self._phases.controls()

    def prepare(
        self,
        kspace: Tensor,
        mask: Tensor,
        calibration: Tensor | None = None,
        consistent: Tensor | None = None,
    ) -> Scan:
        """`scan.prepared` for this architecture."""
        return prepared(kspace, mask, self.architecture, calibration, consistent)

    def dynamics(self, scan: Scan) -> bl.Phases:
        """The maps g and g0 for one batch of scans, see `observation`."""
        if self.architecture.gains:
            data = Measured.of(scan.kspace, scan.mask)
            context = (data.samples, data.mask, scan.consistent, scan.threshold)
        else:
            context = (scan.kspace, scan.mask, scan.normal, scan.phases)
        return replace(self._phases, context=context)

    def observation(self, scan: Scan) -> Any:
        """What g0 receives of a scan."""
        return (scan.start, scan.before) if self.architecture.gains else scan.start

    def coil_images(self, state: Any) -> Tensor:
        """The coil images of a state: the state itself, or the first of a pair."""
        return state[0] if self.architecture.gains else state

    def image(self, scan: Scan, state: Any, control: bl.PerStep) -> Tensor:
        """The magnitude image of u(T), by the J of theta_T if there is one.

        Args:
            scan: what the state was made from.
            state: at T.
            control: all weights.

        Returns:
            Over `scan.scale`, ``(batch, rows, columns)``.
        """
        prefix = "combine."
        weights = {
            name.removeprefix(prefix): value
            for name, value in control.steps[-1].items()
            if name.startswith(prefix)
        }
        return self.combined(state, scan.phases, lambda planes: self._combine(weights, planes))

    def combined(
        self, state: Any, phases: Tensor | None, combine: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The magnitude image of u(T) by a given J.

        Args:
            state: at T.
            phases: `Scan.phases`.
            combine: J, on planes; not called where there is none.

        Returns:
            Over `scan.scale`, ``(batch, rows, columns)``.
        """
        images = self.coil_images(state)
        if self.architecture.gains:
            return rss(images)
        seen = images if phases is None else images * phases.conj()
        image = to_complex(combine(to_planes(seen)))[:, 0]
        return (image + rss(images) if self.architecture.rss_skip else image).abs()

    def training_problem(
        self, scan: Scan, target: Tensor, reference: Tensor, loss: Loss
    ) -> tuple[bl.ControlProblem, Any]:
        """The control problem of one batch, and its observation.

        Args:
            scan: undersampled.
            target: coil images u* of the full data, ``(batch, coils, rows, columns)``, in the units
                of the scanner.
            reference: RSS(u*), ``(batch, rows, columns)``.
            loss: weights of the terms.

        Returns:
            What `bilevel.ControlSolver` takes from `build`.
        """
        target, reference = target / scan.scale, reference / scan.scale[:, 0]

        def of_state(state: Any) -> Tensor:
            difference = torch.view_as_real(self.coil_images(state) - target)
            return 2 * difference.square().mean()  # the mean is over complex values

        units = (1.0, 1.0, 1.0)
        if self.architecture.gains:
            start = ifft2c(scan.start)
            units = tuple(
                float(unit) or 1.0
                for unit in (
                    2 * torch.view_as_real(start - target).square().mean(),
                    (rss(start) - reference).abs().mean(),
                    (start - target).abs().mean(),
                )
            )

        def terminal(state: Any, control: bl.PerStep) -> Tensor:
            combined = (self.image(scan, state, control) - reference).abs().mean()
            return loss.state / units[0] * of_state(state) + loss.combined / units[1] * combined

        def running(state: Any, _control: object, t: int) -> Tensor:
            if t != 1:
                return torch.zeros((), device=target.device)
            return loss.initial / units[2] * (self.coil_images(state) - target).abs().mean()

        problem = bl.ControlProblem(
            self.dynamics(scan), terminal, self.architecture.n_phases, running
        )
        return problem, self.observation(scan)

    def reconstruct(self, scan: Scan, control: bl.PerStep) -> Reconstruction:
        """Runs the phases.

        Args:
            scan: from `prepare`.
            control: trained weights.

        Returns:
            The images, in the units of the scanner.
        """
        with torch.no_grad():
            horizon = self.architecture.n_phases
            state = bl.rollout(self.dynamics(scan), self.observation(scan), control, horizon)
            image = self.image(scan, state, control)
            state = self.coil_images(state)
            defect = _norms(sample(state, scan.mask) - scan.kspace)
            residual = defect / _norms(scan.kspace).clamp_min(1e-30)
        return Reconstruction(image * scan.scale[:, 0], state * scan.scale, residual)


def _norms(values: Tensor) -> Tensor:
    """One a sample; by real and imaginary parts, of which torch takes it 20 times as fast."""
    return torch.view_as_real(values).flatten(1).norm(dim=1)


def classical_reconstruction(
    kspace: Tensor,
    mask: Tensor,
    threshold: float | None = None,
    calibration: Tensor | None = None,
) -> Reconstruction:
    """What `l1_spirit` makes of a slice, in the form of what a network makes of it.

    Args:
        kspace: complex, shape ``(coils, rows, columns)``, zeros where nothing was measured.
        mask: boolean, shape ``(rows, columns)``.
        threshold: of `l1_spirit`.
        calibration: of `l1_spirit`.

    Returns:
        A batch of one.
    """
    images = l1_spirit(kspace, mask, threshold, calibration=calibration)
    measured = kspace.to(images)[None].resolve_conj()
    defect = _norms(sample(images, mask) - measured)
    residual = defect / _norms(measured).clamp_min(1e-30)
    return Reconstruction(rss(images)[None], images[None], residual, method=L1_SPIRIT)
