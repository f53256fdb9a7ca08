"""What the demo shows of its slices: images, the check of each, and multipliers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import bilevel as bl
from applications.mri.data import SliceDataset, VolumeFile, fully_sampled
from applications.mri.evaluation.figures import Panel, draw_reconstructions
from applications.mri.evaluation.methods import L1_SPIRIT, Method
from applications.mri.network.certificate import SliceCertificate
from applications.mri.network.checked import reconstruct
from applications.mri.network.reconstruction import Loss
from applications.mri.network.weights import Trained
from applications.mri.physics.masks import acceleration_of
from applications.mri.physics.operators import ifft2c, rss
from applications.mri.sampling import Sampling

_SHOWN = ("brain_t1_axial", "head_wrapped_t1_coronal")  # within the view, and folding over


@dataclass(frozen=True, eq=False)
class Shown:
    """An undersampled slice of the demo.

    Attributes:
        file: it is the first slice of.
        kspace: undersampled, ``(coils, rows, columns)``.
        mask: ``(rows, columns)``.
        reference: magnitude image.
    """

    file: VolumeFile
    kspace: Tensor
    mask: Tensor
    reference: Tensor

    @property
    def name(self) -> str:
        """Of the file, and the acceleration."""
        return f"{self.file.path.stem}, {acceleration_of(self.mask):.1f} x"

    def panel(self, methods: dict[str, Method], trained: Trained, about: str = "") -> Panel:
        """Its images, with the verdict of the check as the title."""
        images = {name: method(self.kspace, self.mask) for name, method in methods.items()}
        found = self.certificate(trained)
        verdict = "trusted" if found.trustworthy else "not trusted, l1-SPIRiT is given"
        errors = f"held-out error {found.error:.2f}, of l1-SPIRiT {found.classical:.2f}"
        return Panel(f"{self.name}{about}\n{verdict}\n{errors}", images, self.reference)

    def certificate(self, trained: Trained) -> SliceCertificate:
        """What the check says of a network's image."""
        found = reconstruct(self.kspace, self.mask, trained).certificate
        return found or SliceCertificate(float("nan"), float("nan"), 0)


def shown(slices: SliceDataset, sampling: Sampling, seed: int) -> list[Shown]:
    """The first slice of each volume, undersampled as in an evaluation with that seed.

    Args:
        slices: fully sampled scans.
        sampling: draws a mask a volume.
        seed: of the masks.

    Returns:
        The slices.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for file in slices.files:
        mask = sampling.mask(file.shape, generator)
        kspace, reference = fully_sampled(file.read_slice(0))
        found.append(Shown(file, kspace * mask, mask, reference))
    return found


def spoiled(trained: Trained, seed: int, scale: float = 0.3) -> Trained:
    """The network with noise on every weight: one that a check has to catch.

    Args:
        trained: network and weights.
        seed: of the noise.
        scale: standard deviation of the noise.

    Returns:
        The same network with other weights.
    """
    generator = torch.Generator().manual_seed(seed)

    def noisy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: x + scale * torch.randn(x.shape, generator=generator).to(x)
            for name, x in weights.items()
        }

    control = trained.control
    steps, initial = [noisy(one) for one in control.steps], control.initial
    return replace(trained, control=bl.PerStep(steps, initial and noisy(initial)))


def swept_multipliers(trained: Trained, file: VolumeFile, index: int, mask: Tensor) -> list[Tensor]:
    """Magnitudes of lambda_0, ..., lambda_T of the training loss for one slice.

    Args:
        trained: network and weights.
        file: fully sampled scan.
        index: slice.
        mask: undersamples it.

    Returns:
        Root sums of squares over the coils, each ``(rows, columns)``.
    """
    kspace, reference = fully_sampled(file.read_slice(index))
    network = trained.network
    scan = network.prepare(kspace[None], mask)
    problem, start = network.training_problem(scan, ifft2c(kspace)[None], reference[None], Loss())
    found = bl.adjoint(problem, start, trained.control, keep_multipliers=True)
    return [rss(network.coil_images(one))[0] for one in found.multipliers or []]


def draw(
    path: Path,
    trained: Trained,
    methods: dict[str, Method],
    held_out: Sequence[Shown],
    measured: Sequence[Shown],
    seed: int,
) -> None:
    """The figure of the demo.

    Args:
        path: PNG file.
        trained: network and weights.
        methods: all that were scored.
        held_out: simulated slices.
        measured: slices of the measured scan.
        seed: of the weights that are spoiled.
    """
    chosen = [one for one in held_out if one.file.path.stem in _SHOWN] or [*held_out[:1]]
    compared = {name: methods[name] for name in ("zero-filled", L1_SPIRIT, "ours")}
    panels = [one.panel(compared, trained) for one in (*chosen, *measured)]
    bad = spoiled(trained, seed)

    def worse(kspace: Tensor, mask: Tensor) -> Tensor:
        return reconstruct(kspace, mask, bad, check=False).image[0]

    panels.append(chosen[0].panel(compared | {"ours": worse}, bad, ", weights spoiled on purpose"))
    multipliers = swept_multipliers(trained, chosen[0].file, 0, chosen[0].mask)
    every = max(1, (len(multipliers) - 1) // 4)  # five of them
    title = (
        "Held-out slices, a measured scan, weights spoiled on purpose, and the multipliers of the "
        "loss at the first slice"
    )
    draw_reconstructions(path, panels, dict(list(enumerate(multipliers))[::every]), title)
