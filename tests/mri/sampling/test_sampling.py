import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from applications.errors import InputError
from applications.mri.physics.masks import acceleration_of, check_mask
from applications.mri.sampling import (
    CartesianEquispaced,
    CartesianMagic,
    CartesianRandom,
    GaussianColumns,
    GaussianPoints,
    PoissonDisc,
    Radial,
)

ALL = [
    CartesianRandom(4, 0.08),
    CartesianEquispaced(4, 0.08),
    CartesianMagic(4, 0.08),
    GaussianColumns(4, 0.08),
    GaussianPoints(6, 12),
    PoissonDisc(6, 12),
    Radial(24),
    Radial(24, golden=False),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sampling", ALL, ids=repr)
@pytest.mark.parametrize("shape", [(64, 64), (63, 80)])
def test_a_mask_depends_on_the_seed_and_on_nothing_else(sampling, shape):
    first, again = sampling.mask(shape, seeded(1)), sampling.mask(shape, seeded(1))
    assert first.dtype == torch.bool
    assert first.shape == shape
    assert torch.equal(first, again)
    others = [sampling.mask(shape, seeded(seed)) for seed in range(2, 5)]
    assert not all(torch.equal(first, other) for other in others)
    assert first[shape[0] // 2, shape[1] // 2]


@pytest.mark.parametrize("n_columns", [128, 127, 368])
@pytest.mark.parametrize(
    "sampling",
    [
        CartesianRandom(4, 0.08),
        CartesianEquispaced(4, 0.08),
        CartesianEquispaced(8, 0.04),
        CartesianMagic(4, 0.08),
        GaussianColumns(4, 0.08),
    ],
    ids=repr,
)
def test_cartesian_masks_keep_whole_columns_and_all_of_the_centre(sampling, n_columns):
    n_low = round(n_columns * sampling.center_fraction)
    first = (n_columns - n_low + 1) // 2
    mask = sampling.mask((10, n_columns), seeded())
    assert torch.equal(mask, mask[:1].expand(10, -1))
    assert mask[0, first : first + n_low].all()


def test_random_columns_are_kept_with_the_probability_of_fastmri():
    n, n_low, draws = 128, 10, 4000
    generator, sampling = seeded(), CartesianRandom(4, 0.08)
    kept = torch.stack([sampling.mask((1, n), generator)[0] for _ in range(draws)]).double()
    outside = torch.ones(n, dtype=torch.bool)
    outside[59:69] = False
    probability = (n / 4 - n_low) / (n - n_low)
    # Five standard deviations of a binomial mean, over all columns and for the worst single one.
    spread = math.sqrt(probability * (1 - probability) / draws)
    assert float(kept[:, outside].mean()) == pytest.approx(
        probability, abs=5 * spread / math.sqrt(n - n_low)
    )
    assert (kept[:, outside].mean(0) - probability).abs().max() < 5 * spread
    assert float(kept.sum(1).mean()) == pytest.approx(n / 4, abs=5 * spread * math.sqrt(n))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n", [128, 368, 320])
def test_equispaced_columns_are_those_of_the_definition(n, seed):
    sampling = CartesianEquispaced(4, 0.08)
    found = np.flatnonzero(sampling.mask((1, n), seeded(seed))[0].numpy())
    n_low = round(n * 0.08)
    pad = (n - n_low + 1) // 2
    spacing = 4 * (n_low - n) / (n_low * 4 - n)
    possible = [
        set(np.around(np.arange(offset, n - 1, spacing)).astype(int)) | set(range(pad, pad + n_low))
        for offset in range(round(spacing))
    ]
    assert set(found) in possible
    assert n / len(found) == pytest.approx(4, rel=0.05)


def magic_of_fastmri(n, n_low, acceleration, offset):
    """MagicMaskFractionFunc: two halves in the order of the transform, then shifted."""
    spacing = round(n / (round(n / acceleration) - n_low))
    offset_pos, offset_neg = (
        (offset + 1, offset + 2) if offset % 2 == 0 else (offset + 2, offset - 1)
    )
    positive, negative = np.zeros((n + 1) // 2, bool), np.zeros(n // 2, bool)
    positive[offset_pos::spacing] = True
    negative[offset_neg::spacing] = True
    mask = np.fft.fftshift(np.concatenate([positive, negative[::-1]]))
    pad = (n - n_low + 1) // 2
    mask[pad : pad + n_low] = True
    return mask, spacing


@pytest.mark.parametrize("acceleration", [4, 6])
@pytest.mark.parametrize("n", [128, 127, 368, 320])
def test_magic_columns_are_those_of_fastmri(n, acceleration):
    n_low = round(n * 0.04)
    _, spacing = magic_of_fastmri(n, n_low, acceleration, 0)
    possible = [magic_of_fastmri(n, n_low, acceleration, k)[0] for k in range(spacing)]
    seen = set()
    for seed in range(40):
        found = CartesianMagic(acceleration, 0.04).mask((3, n), seeded(seed))
        matches = [k for k, mask in enumerate(possible) if np.array_equal(mask, found[1].numpy())]
        assert matches
        seen.update(matches)
        assert acceleration_of(found) == pytest.approx(acceleration, rel=0.15)
    assert len(seen) == spacing  # every offset is drawn


def test_the_halves_of_magic_measure_each_others_gaps():
    """With an even number of columns -k is column n - k; away from the centre no two coincide."""
    mask = CartesianMagic(4, 0.04).mask((1, 320), seeded(1))[0]
    frequency = torch.arange(320) - 160
    outer = mask & (frequency.abs() > 10)
    opposite = outer.flip(0).roll(1)
    assert not (outer & opposite)[1:].any()
    equal = CartesianEquispaced(4, 0.04)
    assert any(
        bool((m & m.flip(0).roll(1) & (frequency.abs() > 10)).any())
        for m in (equal.mask((1, 320), seeded(k))[0] for k in range(8))
    )


@pytest.mark.parametrize("acceleration", [2, 4, 8])
@pytest.mark.parametrize("n_columns", [128, 127, 368])
def test_gaussian_columns_reach_the_acceleration_exactly(acceleration, n_columns):
    mask = GaussianColumns(acceleration, 0.04).mask((5, n_columns), seeded())
    assert int(mask[0].sum()) == round(n_columns / acceleration)


@pytest.mark.parametrize("acceleration", [2, 4, 8, 12])
@pytest.mark.parametrize("shape", [(96, 96), (115, 90)])
def test_gaussian_points_reach_the_acceleration_exactly_and_keep_the_calibration(
    acceleration, shape
):
    mask = GaussianPoints(acceleration, 16).mask(shape, seeded())
    assert int(mask.sum()) == round(shape[0] * shape[1] / acceleration)
    top, left = shape[0] // 2 - 8, shape[1] // 2 - 8
    assert mask[top : top + 16, left : left + 16].all()


@pytest.mark.parametrize("width", [0.1, 0.3])
def test_few_gaussian_columns_follow_their_density(width):
    """Of few draws without replacement the frequency is proportional to the density."""
    n, draws = 64, 1500
    generator, sampling = seeded(), GaussianColumns(n / 2.4, 0.015, width)  # 2 kept, 1 of them low
    kept = torch.stack([sampling.mask((1, n), generator)[0] for _ in range(draws)]).double()
    outside = torch.arange(n) != n // 2
    density = torch.exp(-0.5 * ((torch.arange(n) - n // 2) / (width * n)).double().square())
    expected = density[outside] / density[outside].sum()
    spread = (expected / draws).sqrt()
    assert ((kept.mean(0)[outside] - expected).abs() <= 5 * spread + 1 / draws).all()


@pytest.mark.parametrize("sampling", [GaussianColumns(4, 0.04), GaussianPoints(6, 8)], ids=repr)
def test_gaussian_density_falls_away_from_the_centre(sampling):
    shape, generator = (64, 80), seeded()
    mean = torch.stack([sampling.mask(shape, generator) for _ in range(400)]).double().mean(0)
    row, column = ((torch.arange(n) - n // 2).abs() / (n / 2) for n in shape)
    distances = [column.expand(shape)]
    if isinstance(sampling, GaussianPoints):
        distances.append(row[:, None].expand(shape))
    for distance in distances:
        rings = [mean[(distance >= a) & (distance < a + 0.2)].mean() for a in (0.1, 0.3, 0.5, 0.7)]
        assert all(near > 1.2 * far for near, far in pairwise(rings))


@pytest.mark.parametrize("acceleration", [2, 4, 8, 12])
@pytest.mark.parametrize("shape", [(96, 96), (115, 90)])
def test_poisson_discs_reach_the_acceleration_exactly_and_keep_the_calibration(acceleration, shape):
    mask = PoissonDisc(acceleration, 16).mask(shape, seeded())
    assert int(mask.sum()) == round(shape[0] * shape[1] / acceleration)
    assert acceleration_of(mask) == pytest.approx(acceleration, rel=0.01)
    top, left = shape[0] // 2 - 8, shape[1] // 2 - 8
    assert mask[top : top + 16, left : left + 16].all()


def test_poisson_discs_leave_a_distance_that_grows_away_from_the_centre():
    n = 128
    row, column = torch.where(PoissonDisc(10, 0).mask((n, n), seeded()))
    points = torch.stack([row, column], 1).double().numpy() - n // 2
    nearest = cKDTree(points).query(points, k=2)[0][:, 1]
    radius = np.hypot(*points.T) / (n / 2)
    means = [nearest[(radius >= a) & (radius < a + 0.2)].mean() for a in (0.0, 0.2, 0.4, 0.6, 0.8)]
    assert means == sorted(means)
    assert nearest[radius > 0.8].min() >= 3
    # Uniformly random points of the same density would come within 1.5 of each other all the time.
    density = np.mean(radius > 0.8) * len(points) / ((4 - math.pi * 0.64) * (n / 2) ** 2)
    assert nearest[radius > 0.8].min() * math.sqrt(density) > 0.5


@pytest.mark.parametrize("golden", [True, False])
def test_spokes_are_diameters_without_holes(golden):
    mask = Radial(1, golden).mask((65, 65), seeded(3))
    row, column = torch.where(mask)
    offset = torch.stack([row, column], 1).double() - 32
    direction = torch.linalg.svd(offset, full_matrices=False).Vh[0]
    # Rounded to the grid, no point lies further than half a diagonal from the line.
    assert (offset - offset @ direction[:, None] * direction).norm(dim=1).max() < 0.75
    assert torch.equal(mask, mask.flip(0, 1))
    # Along the axis closer to the spoke every position from end to end is there.
    major = row if direction[0].abs() > direction[1].abs() else column
    assert len(torch.unique(major)) == int(major.max() - major.min()) + 1
    assert float(offset.norm(dim=1).max()) == pytest.approx(32, abs=1)


def test_more_golden_spokes_contain_the_fewer_and_lower_the_acceleration():
    few, many = (Radial(n).mask((64, 64), seeded()) for n in (8, 21))
    assert bool((many | ~few).all())
    assert acceleration_of(many) < acceleration_of(few)


def test_the_settings_change_the_mask():
    def draw(sampling):
        return sampling.mask((64, 64), seeded())

    assert not torch.equal(draw(CartesianRandom(4, 0.08)), draw(CartesianRandom(3, 0.08)))
    assert not torch.equal(draw(CartesianRandom(4, 0.08)), draw(CartesianRandom(4, 0.16)))
    assert not torch.equal(draw(CartesianEquispaced(4, 0.08)), draw(CartesianEquispaced(3, 0.08)))
    assert not torch.equal(draw(PoissonDisc(4, 8)), draw(PoissonDisc(4, 16)))
    assert not torch.equal(draw(CartesianMagic(4, 0.08)), draw(CartesianMagic(3, 0.08)))
    assert not torch.equal(draw(CartesianMagic(4, 0.08)), draw(CartesianMagic(4, 0.16)))
    for kind, centres in ((GaussianColumns, (0.08, 0.16)), (GaussianPoints, (8, 16))):
        first = draw(kind(4, centres[0], 0.2))
        assert not torch.equal(first, draw(kind(3, centres[0], 0.2)))
        assert not torch.equal(first, draw(kind(4, centres[1], 0.2)))
        assert not torch.equal(first, draw(kind(4, centres[0], 0.1)))
    assert not torch.equal(draw(Radial(8)), draw(Radial(8, golden=False)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CartesianRandom(1.0), "acceleration must be > 1, got 1.0"),
        (lambda: CartesianEquispaced(math.nan), "acceleration must be > 1"),
        (lambda: CartesianRandom(4, 0.0), r"center_fraction must lie in \(0, 1\]"),
        (lambda: CartesianEquispaced(4, 1.5), r"center_fraction must lie in \(0, 1\], got 1.5"),
        (lambda: CartesianRandom(4, 0.3), "below 1 / acceleration = 0.25, got 0.3"),
        (lambda: PoissonDisc(0.5), "acceleration must be > 1"),
        (lambda: CartesianMagic(4, 0.3), "below 1 / acceleration = 0.25, got 0.3"),
        (lambda: GaussianColumns(4, 0.3), "below 1 / acceleration = 0.25, got 0.3"),
        (lambda: GaussianColumns(width=0.0), "width must be > 0, got 0.0; 1 / 6 reaches"),
        (lambda: GaussianPoints(width=math.inf), "width must be > 0, got inf"),
        (lambda: GaussianPoints(4, -1), "calibration must be >= 0, got -1"),
        (lambda: GaussianPoints(8, 24).mask((48, 48), seeded()), "leaves 288 samples of a 48 x 48"),
        (lambda: PoissonDisc(4, -1), "calibration must be >= 0, got -1"),
        (lambda: Radial(0), "spokes must lie in 1 to 10000, got 0"),
        (lambda: PoissonDisc(8, 24).mask((48, 48), seeded()), "leaves 288 samples of a 48 x 48"),
        (lambda: PoissonDisc(2, 24).mask((20, 400), seeded()), "24 x 24 calibration square"),
        (lambda: CartesianRandom(4, 0.08).mask((8, 4), seeded()), "of 4 columns acceleration 4"),
        (lambda: Radial(3).mask((0, 4), seeded()), "the matrix size must be"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_mask_that_does_not_fit_is_refused():
    good = torch.ones(4, 6, dtype=torch.bool)
    check_mask(good, (4, 6))
    with pytest.raises(InputError, match=r"scan.h5: mask must be boolean, got torch.int64"):
        check_mask(good.long(), (4, 6), "scan.h5: mask")
    with pytest.raises(InputError, match=r"must have shape \(4, 5\), got \(4, 6\)"):
        check_mask(good, (4, 5))
    with pytest.raises(InputError, match="keeps none"):
        check_mask(~good, (4, 6))
    with pytest.raises(InputError, match="keeps none"):
        acceleration_of(~good)


def test_the_acceleration_of_a_mask_is_a_ratio_of_counts():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, :3] = True
    assert acceleration_of(mask) == 8.0
