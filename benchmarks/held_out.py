"""The check of a slice against the truth: what it flags, and what it should have flagged.

Run with `python -m benchmarks.held_out [--scans FILE] [--bodies FILE] [--weights FILE]`; the files
are those of `benchmarks.measured`. On every slice, bundled, with phase true to life and without,
wrapped, measured, and with the disc of `benchmarks.measured`, under both samplings, three networks
are checked: the trained one, and it with noise of 0.1 and of 0.3 on every weight. A slice should be
flagged where the network is 2 dB or more below l1-SPIRiT, and not where it is above; between the
two nothing is asked. Both are counted by the PSNR over the image and by that over the object: on
references that are black in air a network that leaves noise there is below over the image alone,
and no sample tells air from noise. The trained network is checked on scans that are wrong in
themselves, too: a centre with random phases, and coils that change their order halfway.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from applications.mri.commands.demo_figure import spoiled
from applications.mri.network.certificate import SliceCertificate
from applications.mri.network.checked import reconstruct
from applications.mri.network.weights import PRETRAINED, Trained, weights_named
from applications.mri.physics.consistency import fully_sampled_centre
from applications.mri.physics.l1_spirit import l1_spirit
from applications.mri.physics.operators import rss
from applications.mri.simulation.anatomy import load_anatomies, resize
from applications.mri.simulation.simulate import simulate
from applications.mri.simulation.views import in_view
from benchmarks.measure import machine
from benchmarks.measured import SAMPLINGS, Case, bodies, measured, object_psnr

SIZE, SEED, CLEARLY = 160, 1, 2.0
OVER = "image", "object"


def simulated() -> Iterator[Case]:
    """The middle test-sized slice of every bundled anatomy, five ways."""
    for name, images in load_anatomies().items():
        image = resize(images[len(images) // 2][None], SIZE)[0].clamp(0, 1)
        for about, phase, noise, coils in (
            ("smooth phase", 0.0, 0.01, 8),
            ("true phase", 1.0, 0.01, 8),
            ("true phase, noise", 1.0, 0.02, 6),
            ("true phase, 12 coils", 1.0, 0.005, 12),
        ):
            generator = torch.Generator().manual_seed(SEED)
            one = simulate(image, coils, generator, noise, local_phase=phase)
            yield Case(f"{name}, {about}", one.kspace, one.reference)
        kspace, reference = in_view(one, round(0.7 * SIZE / 2) * 2)
        yield Case(f"{name}, wrapped", kspace, reference)


def calibration_lost(kspace: Tensor, mask: Tensor) -> Tensor:
    """Random phases on the fully sampled centre."""
    top, bottom, left, right = fully_sampled_centre(mask)
    generator = torch.Generator().manual_seed(SEED)
    found = kspace.clone()
    centre = found[:, top:bottom, left:right]
    angle = 2 * math.pi * torch.rand(centre.shape, generator=generator)
    found[:, top:bottom, left:right] = centre * torch.polar(torch.ones_like(angle), angle)
    return found


def order_changed(kspace: Tensor, _mask: Tensor) -> Tensor:
    """The coils in another order, in half of k-space."""
    found, half = kspace.clone(), kspace.shape[-1] // 2
    found[..., half:] = found[..., half:].roll(1, 0)
    return found


def psnr(image: Tensor, reference: Tensor) -> float:
    """Over the image, of the largest value of the reference [dB]."""
    return 10 * math.log10(float(reference.max() ** 2 / (image - reference).square().mean()))


def judged(
    case: Case, kspace: Tensor, mask: Tensor, networks: dict[str, Trained]
) -> Iterator[tuple[str, tuple[float, ...], SliceCertificate]]:
    """Of each network: its gains over l1-SPIRiT over image and object [dB], and the check."""
    classical = rss(l1_spirit(kspace, mask))
    for name, trained in networks.items():
        found = reconstruct(kspace, mask, trained, fallback=False)
        certificate = found.certificate
        assert certificate is not None
        gains = (
            psnr(found.image[0], case.reference) - psnr(classical, case.reference),
            object_psnr(case.reference, found.image[0]) - object_psnr(case.reference, classical),
        )
        yield name, gains, certificate


def main() -> None:
    """Count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scans", type=Path)
    parser.add_argument("--bodies", type=Path)
    parser.add_argument("--weights", default=PRETRAINED)
    given = parser.parse_args()
    torch.set_num_threads(1)
    trained = weights_named(given.weights)
    cases = list(simulated())
    if given.scans:
        cases += measured(given.scans)
    if given.bodies:
        cases += bodies(given.bodies, ("body_2", "body_4", "body_7"))
    networks = {"trained": trained} | {
        f"noise {scale:g} on weights": spoiled(trained, SEED, scale) for scale in (0.1, 0.3)
    }
    harms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "centre lost": calibration_lost,
        "order changed": order_changed,
    }
    counts: Counter[tuple[str, str, str, bool]] = Counter()
    for case in cases:
        for sampling, drawn in SAMPLINGS.items():
            shape = (case.kspace.shape[1], case.kspace.shape[2])
            mask = drawn.mask(shape, torch.Generator().manual_seed(SEED))
            kspace = case.kspace * mask
            rows = [("", *one) for one in judged(case, kspace, mask, networks)]
            for name, harm in harms.items():
                harmed = harm(kspace, mask)
                rows += [(name, *one) for one in judged(case, harmed, mask, {"trained": trained})]
            for harmed, name, gains, check in rows:
                flagged = not check.trustworthy
                for over, gain in zip(OVER, gains, strict=True):
                    kind = "above" if gain > 0 else "2 dB below" if gain <= -CLEARLY else "between"
                    counts[harmed, over, kind, flagged] += 1
                print(
                    f"{case.name:40} {sampling:12} {harmed:14} {name:20} {gains[0]:+6.2f} dB, "
                    f"object {gains[1]:+6.2f} dB  {check.error:.3f} {check.classical:.3f}  "
                    f"{'flagged' if flagged else ''}",
                    flush=True,
                )
    print(machine())
    for harmed, over in product(("", *harms), OVER):
        for kind in ("2 dB below", "between", "above"):
            flagged, not_ = (counts[harmed, over, kind, one] for one in (True, False))
            print(
                f"{harmed or 'sound':14} {over:7} {kind:12} {flagged + not_:4} slices, "
                f"flagged {flagged}"
            )


if __name__ == "__main__":
    main()
