"""The check of a slice: what is held out, what is predicted, and what is said of it."""

import json
import math
from dataclasses import replace

import pytest
import torch

from applications.errors import InputError
from applications.mri import reconstruct
from applications.mri.network.architecture import light, narrow
from applications.mri.network.certificate import CORRUPTED, HOPELESS, WORSE, SliceCertificate
from applications.mri.network.held_out import calibration_kept, certified, held_out
from applications.mri.network.reconstruction import L1_SPIRIT, NETWORK, Network
from applications.mri.network.weights import Trained, pretrained
from applications.mri.physics.consistency import (
    centre_noise,
    fully_sampled_centre,
    towards_consistency,
)
from applications.mri.physics.l1_spirit import l1_spirit
from applications.mri.physics.operators import fft2c, rss
from applications.mri.sampling import CartesianEquispaced, CartesianRandom, PoissonDisc
from applications.mri.simulation.simulate import simulate
from bilevel import tree

SIZE, COILS = 64, 4
COLUMNS, POINTS = CartesianRandom(3, 0.15), PoissonDisc(4, 16)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scan(seed=0, sampling=POINTS):
    rows, columns = (torch.arange(SIZE) - 32)[:, None], torch.arange(SIZE) - 32
    disc = ((rows**2 + columns**2).sqrt() < 24).float() * 0.5
    disc[24:40, 20:30] = 1.0
    disc[36:40, 36:44] = 0.1
    one = simulate(disc, COILS, seeded(seed), 0.005)
    mask = sampling.mask((SIZE, SIZE), seeded(seed + 1))
    return one.kspace * mask, mask, one


def network(seed=0):
    made = Network(light(), seed)
    return Trained(made, made.controls(), {})


def spoiled(trained, scale=1.0):
    """The same with noise on every weight: a network that is wrong."""
    generator = seeded(5)
    control = tree.map_leaves(
        lambda x: x + scale * torch.randn(x.shape, generator=generator) if x is not None else x,
        trained.control,
    )
    return replace(trained, control=control)


@pytest.mark.parametrize(
    "sampling", [COLUMNS, CartesianEquispaced(4, 0.12), POINTS, PoissonDisc(8, 12)], ids=repr
)
@pytest.mark.parametrize("shape", [(64, 64), (40, 97)])
def test_a_tenth_outside_the_centre_is_held_out(sampling, shape):
    mask = sampling.mask(shape, seeded())
    kept, held = held_out(mask)
    top, bottom, left, right = calibration_kept(mask)
    assert torch.equal(kept | held, mask)
    assert not bool((kept & held).any())
    assert not bool(held[top:bottom, left:right].any())
    outside = mask.clone()
    outside[top:bottom, left:right] = False
    if bool((mask.any(0) == mask.all(0)).all()):  # whole columns
        assert torch.equal(held.any(0), held.all(0))
        share = held.any(0).sum() / outside.any(0).sum()
    else:
        share = held.sum() / outside.sum()
    assert 0.09 < float(share) < 0.25  # of a few columns one is more than a tenth
    assert torch.equal(held, held_out(mask)[1])


@pytest.mark.parametrize("cut", ["echo", "zeros", "zeros in the centre"])
def test_of_columns_that_have_gaps_whole_columns_are_held_out(cut):
    """Their other samples would tell what is missing."""
    mask = COLUMNS.mask((80, 90), seeded(2))
    _, _, left, right = fully_sampled_centre(mask)
    whole = held_out(mask)[1].any(0)
    measured = mask.clone()
    if cut == "echo":
        measured[:25] = False
    elif cut == "zeros":
        generator = seeded(3)
        measured &= torch.rand(mask.shape, generator=generator) > 0.02
    else:
        measured[37, 46] = False
    kept, held = held_out(measured)
    assert torch.equal(held, measured & held.any(0))
    assert 0 < int(held.any(0).sum()) < mask.any(0).sum() // 4
    assert torch.equal(kept | held, measured)
    if cut == "echo":
        assert torch.equal(held.any(0), whole)
        assert not bool(held[:, left:right].any())


@pytest.mark.parametrize("columns", [True, False])
def test_of_a_large_centre_the_middle_stays_and_a_full_scan_is_checked_too(columns):
    mask = torch.ones(80, 70, dtype=torch.bool)
    if not columns:
        mask[0, 3] = False
    _, held = held_out(mask)
    middle = held[28:52, 23:47]
    assert not bool(middle.any())
    assert 0.04 < float(held.float().mean()) < 0.12
    _, _, one = scan()
    full = torch.ones(SIZE, SIZE, dtype=torch.bool)
    found = reconstruct(one.kspace, full)
    assert found.certificate.n_held_out > 0
    assert found.certificate.trustworthy


def test_places_near_the_centre_are_among_those_held_out():
    mask = COLUMNS.mask((128, 128), seeded(2))
    distance = (held_out(mask)[1].any(0).nonzero()[:, 0] - 64).abs()
    _, _, left, right = fully_sampled_centre(mask)
    assert int(distance.min()) < (right - left) // 2 + 16
    assert int(distance.max()) > 45


def test_errors_are_those_of_a_reconstruction_without_the_samples():
    kspace, mask, _ = scan()
    kept, held = held_out(mask)
    trained = network()
    found = certified(trained, kspace, mask)
    again = trained.network.reconstruct(
        trained.network.prepare((kspace * kept)[None], kept), trained.control
    )
    defect = (fft2c(again.coil_images[0]) - kspace)[:, held]
    assert found.error == pytest.approx(float(defect.norm() / kspace[:, held].norm()), rel=1e-5)
    assert found.n_held_out == int(held.sum())
    # What is held out never enters: other values there change no prediction.
    changed = torch.where(held, 7 * kspace, kspace)
    other = certified(trained, changed, mask)
    defect = (fft2c(again.coil_images[0]) - changed)[:, held]
    assert other.error == pytest.approx(float(defect.norm() / changed[:, held].norm()), rel=1e-5)


@pytest.mark.parametrize("sampling", [COLUMNS, POINTS], ids=repr)
def test_the_bundled_network_is_trusted_and_a_spoiled_one_is_not(sampling):
    kspace, mask, one = scan(0, sampling)
    good = reconstruct(kspace, mask)
    assert good.certificate.trustworthy
    assert good.method == NETWORK
    bad = reconstruct(kspace, mask, spoiled(network()))
    assert not bad.certificate.trustworthy
    assert "worse than l1-SPIRiT" in bad.certificate.reason
    assert bad.method == L1_SPIRIT
    torch.testing.assert_close(bad.image[0], rss(l1_spirit(kspace, mask)))
    kept = reconstruct(kspace, mask, spoiled(network()), fallback=False)
    assert kept.method == NETWORK
    assert not kept.certificate.trustworthy
    far = (kept.image[0] - one.reference).norm()
    assert far > 2 * (bad.image[0] - one.reference).norm()


def test_a_network_of_the_paper_is_compared_with_l1_spirit_too():
    made = Network(replace(narrow(COILS), n_phases=2, filters=4, features=2), 1)
    kspace, mask, _ = scan()
    kept, held = held_out(mask)
    found = certified(Trained(made, made.controls(), {}), kspace, mask)
    defect = (fft2c(l1_spirit(kspace * kept, kept)) - kspace)[:, held]
    assert found.classical == pytest.approx(float(defect.norm() / kspace[:, held].norm()), rel=1e-4)


def test_noise_alone_is_predicted_by_nothing():
    noise = torch.randn(COILS, SIZE, SIZE, dtype=torch.complex64, generator=seeded(3))
    _, mask, _ = scan()
    found = reconstruct(noise * mask, mask, network())
    assert not found.certificate.trustworthy
    assert "neither" in found.certificate.reason or "worse" in found.certificate.reason


@pytest.mark.parametrize("sampling", [COLUMNS, PoissonDisc(4, 24)], ids=repr)
def test_a_centre_that_is_noisier_than_the_rest_is_not_trusted(sampling):
    """Nothing of it is held out, and the rest is predicted well by what it calibrates."""
    rows, columns = (torch.arange(96) - 48)[:, None], torch.arange(96) - 48
    disc = ((rows**2 + columns**2).sqrt() < 36).float() * 0.5
    disc[50:60, 30:50] = 1.0
    full = simulate(disc, 6, seeded(), 0.005).kspace
    mask = sampling.mask((96, 96), seeded(1))
    top, bottom, left, right = fully_sampled_centre(mask)
    centre = full[:, top:bottom, left:right]
    noise = torch.randn(centre.shape, dtype=centre.dtype, generator=seeded(2))
    harmed = full.clone()
    harmed[:, top:bottom, left:right] = centre + centre.abs().mean() * noise
    noisy = full + full.abs().mean() * torch.randn(
        full.shape, dtype=full.dtype, generator=seeded(3)
    )
    for kspace, low, high in ((full, 0, 1.5), (noisy, 0.5, 1.5), (harmed, 2 * CORRUPTED, 1e9)):
        assert low < centre_noise(kspace * mask, mask) < high
        assert centre_noise(kspace[:5] * mask, mask) == 0
    found = certified(network(), harmed * mask, mask)
    assert not found.trustworthy
    worse = replace(found, error=0.3, classical=0.3)
    assert "the centre holds more noise than the rest" in worse.reason
    assert replace(worse, centre_noise=CORRUPTED).trustworthy
    assert not replace(worse, centre_noise=math.nan).trustworthy
    assert certified(network(), harmed * mask, mask, full * mask).centre_noise == 0


def test_without_samples_outside_the_centre_nothing_is_held_out():
    kspace, _, _ = scan()
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[24:40, 24:40] = True
    found = reconstruct(kspace, mask, network())
    assert found.certificate.n_held_out == 0
    assert "too few samples" in found.certificate.reason
    assert found.method == NETWORK
    assert json.loads(json.dumps(found.certificate.as_json()))["held_out_error"] is None


@pytest.mark.parametrize(
    ("error", "classical", "trusted", "replaceable"),
    [
        (0.3, 0.3, True, False),
        (0.3 * WORSE * 1.01, 0.3, False, True),
        (HOPELESS * 1.01, HOPELESS * 1.01, False, False),
        (2.0, HOPELESS * 1.01, False, False),
        (2.0, 0.9, False, True),
        (math.nan, 0.9, False, True),
        (math.nan, math.nan, False, False),
        (0.0, 0.0, True, False),
    ],
)
def test_verdicts(error, classical, trusted, replaceable):
    found = SliceCertificate(error, classical, 10)
    assert found.trustworthy == trusted
    assert found.replaceable == replaceable
    assert ("not trustworthy: " in str(found)) != trusted


def test_the_mask_may_be_left_out_and_the_check_switched_off():
    kspace, mask, _ = scan()
    trained = network()
    found = reconstruct(kspace, trained=trained, check=False)
    assert found.certificate is None
    expected = trained.network.reconstruct(
        trained.network.prepare(kspace[None], mask), trained.control
    )
    assert torch.equal(found.image, expected.image)


def test_a_mask_of_columns_is_one_of_whole_columns():
    kspace, mask, _ = scan(sampling=COLUMNS)
    trained = network()
    found = reconstruct(kspace, mask[0], trained, check=False)
    assert torch.equal(found.image, reconstruct(kspace, mask, trained, check=False).image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kspace, mask: (kspace.tolist(), mask), "kspace must be a tensor or an array of"),
        (lambda kspace, mask: (kspace, mask.tolist()), "mask must be a tensor or an array of"),
        (lambda kspace, mask: (kspace, mask.float()), "mask must be boolean, got torch.float32"),
        (lambda kspace, mask: (kspace, mask[:, :5]), r"shape \(64, 64\), got \(64, 5\)"),
        (lambda kspace, mask: (kspace, mask[0, :5]), r"shape \(64, 64\), got \(5,\)"),
    ],
    ids=["list", "list of a mask", "numbers", "columns left out", "a short one"],
)
def test_what_is_no_slice_or_mask_is_refused(change, message):
    kspace, mask, _ = scan()
    with pytest.raises(InputError, match=message):
        reconstruct(*change(kspace, mask), network())


@pytest.mark.parametrize("n_coils", [1, 2, 11])
def test_any_number_of_coils_is_taken(n_coils):
    kspace, mask, _ = scan()
    copies = torch.cat(3 * [kspace])[:n_coils]
    found = reconstruct(copies, mask, network(), check=False)
    assert found.coil_images.shape == (1, n_coils, SIZE, SIZE)
    narrow_one = Network(replace(narrow(COILS), n_phases=1, filters=2, features=2), 1)
    found = reconstruct(copies, mask, Trained(narrow_one, narrow_one.controls(), {}), check=False)
    assert found.image.shape == (1, SIZE, SIZE)


@pytest.mark.parametrize(
    ("sampling", "times"), [(POINTS, 1), (CartesianRandom(2, 0.45), 2)], ids=repr
)
def test_coils_are_calibrated_once_unless_some_of_the_centre_is_held_out(
    monkeypatch, sampling, times
):
    kspace, mask, _ = scan(0, sampling)
    trained, calls = pretrained(), []
    fresh = certified(trained, kspace, mask)

    def counted(*given):
        calls.append(1)
        return towards_consistency(*given)

    monkeypatch.setattr("applications.mri.network.scan.towards_consistency", counted)
    found = reconstruct(kspace, mask, trained, fallback=False).certificate
    assert len(calls) == times
    assert found.error == pytest.approx(fresh.error, rel=1e-4)
    assert found.classical == pytest.approx(fresh.classical, rel=1e-4)
