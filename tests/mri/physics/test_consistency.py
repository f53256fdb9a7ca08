from itertools import pairwise

import pytest
import torch

from applications.errors import InputError
from applications.mri.evaluation.metrics import score
from applications.mri.physics.consistency import (
    _image_domain,
    bounded,
    calibrate,
    consistent_image,
    fitted_kernels,
    fully_sampled_centre,
    inconsistency_normal,
    low_resolution_phase,
    normal_of,
    times,
    towards_consistency,
)
from applications.mri.physics.operators import fft2c, ifft2c, rss, sample, sample_adjoint
from applications.mri.sampling import CartesianRandom, PoissonDisc, Radial
from applications.mri.simulation.anatomy import load_anatomies, resize
from applications.mri.simulation.simulate import simulate

SIZE, KERNEL = 32, 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_complex(*shape, seed=0):
    return torch.randn(shape, dtype=torch.complex128, generator=seeded(seed))


@pytest.fixture(scope="module")
def full():
    image = resize(load_anatomies()["brain_t1_axial"][8], SIZE)
    return simulate(image, 4, seeded(), noise_std=1e-3)


def everything(rows=SIZE, columns=SIZE):
    return torch.ones(rows, columns, dtype=torch.bool)


def kernels_of(matrices):
    """The k-space weights of K by Fourier series: offset (a, b) at (rows // 2 + a, ...)."""
    images = matrices.permute(2, 3, 0, 1).to(torch.complex128)
    # ifft2c is orthonormal, but a weight of 1 at offset 0 is the constant 1 in the image.
    return ifft2c(images) / images[0, 0].numel() ** 0.5


def by_least_squares(kspace, kernel, regularisation):
    """The same fit written as loops and one least-squares problem a coil."""
    n_coils, n_rows, n_columns = kspace.shape
    half = kernel // 2
    patches, targets = [], []
    for y in range(half, n_rows - half):
        for x in range(half, n_columns - half):
            box = kspace[:, y - half : y + half + 1, x - half : x + half + 1]
            patches.append(box.reshape(-1))
            targets.append(kspace[:, y, x])
    patches, targets = torch.stack(patches), torch.stack(targets)
    shift = regularisation * patches.abs().square().sum(0).mean()
    found = torch.zeros(n_coils, n_coils * kernel**2, dtype=kspace.dtype)
    for coil in range(n_coils):
        used = [i for i in range(n_coils * kernel**2) if i != coil * kernel**2 + kernel**2 // 2]
        damped = torch.cat([patches[:, used], shift.sqrt() * torch.eye(len(used))])
        padded = torch.cat([targets[:, coil], torch.zeros(len(used), dtype=kspace.dtype)])
        found[coil, used] = torch.linalg.lstsq(damped, padded[:, None]).solution[:, 0]
    return found.reshape(n_coils, n_coils, kernel, kernel)


@pytest.mark.parametrize("regularisation", [0.02, 0.2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_the_kernels_are_the_regularised_least_squares_fit_of_the_centre(
    full, kernel, regularisation
):
    top, left, side = 9, 8, 15
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    found = kernels_of(calibrate(full.kspace * mask, mask, kernel, regularisation))
    centre = full.kspace[:, top : top + side, left : left + side].to(torch.complex128)
    expected = torch.zeros_like(found)
    half, middle = kernel // 2, SIZE // 2
    box = slice(middle - half, middle + half + 1)
    expected[..., box, box] = by_least_squares(centre, kernel, regularisation)
    # complex64 is what calibrate returns
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_product_with_the_matrices_is_a_correlation_of_kspace(full):
    matrices = calibrate(full.kspace, everything()).to(torch.complex128)
    weights, middle, half = kernels_of(matrices), SIZE // 2, KERNEL // 2
    state = random_complex(4, SIZE, SIZE)
    values = fft2c(state)
    found = fft2c(times(matrices, state))
    for y, x in [(half, 7), (16, 16), (SIZE - half - 1, 20), (11, SIZE - half - 1)]:
        expected = torch.zeros(4, dtype=torch.complex128)
        for a in range(-half, half + 1):
            for b in range(-half, half + 1):
                expected += weights[:, :, middle + a, middle + b] @ values[:, y + a, x + b]
        torch.testing.assert_close(found[:, y, x], expected, rtol=0, atol=1e-6)


def test_the_kernels_predict_the_kspace_of_simulated_coils(full):
    matrices = calibrate(full.kspace, everything(), regularisation=1e-4)
    image = ifft2c(full.kspace)
    defect = times(matrices, image) - image
    assert defect.norm() < 0.02 * image.norm()
    # Not because K is the identity: it is fitted without the value it predicts.
    other = random_complex(4, SIZE, SIZE).to(torch.complex64)
    assert (times(matrices, other) - other).norm() > 0.5 * other.norm()


def test_a_coil_without_neighbours_in_kspace_is_predicted_by_the_other_coil():
    kspace = random_complex(1, SIZE, SIZE)
    pair = torch.cat([kspace, 2j * kspace])
    matrices = calibrate(pair, everything(), regularisation=1e-9).to(torch.complex128)
    expected = torch.tensor([[0, -0.5j], [2j, 0]], dtype=torch.complex128)
    expected = expected.expand(SIZE, SIZE, 2, 2)
    torch.testing.assert_close(matrices, expected, rtol=0, atol=1e-6)


def test_a_product_and_that_of_the_conjugate_transpose_pass_the_dot_product_test():
    matrices = random_complex(6, 5, 3, 3)
    u, v = random_complex(3, 6, 5, seed=1), random_complex(3, 6, 5, seed=2)
    left, right = (times(matrices, u).conj() * v).sum(), (u.conj() * times(matrices.mH, v)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=0)
    torch.testing.assert_close(times(matrices, u), torch.einsum("yxoi,iyx->oyx", matrices, u))


def test_the_normal_matrices_are_those_of_the_inconsistency():
    matrices = random_complex(6, 5, 3, 3)
    normal = inconsistency_normal(matrices)
    u, v = random_complex(3, 6, 5, seed=1), random_complex(3, 6, 5, seed=2)
    defects = [times(matrices, w) - w for w in (u, v)]
    expected = (defects[0].conj() * defects[1]).sum()
    torch.testing.assert_close((u.conj() * times(normal, v)).sum(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close((times(normal, u).conj() * v).sum(), expected, rtol=1e-12, atol=0)
    w = u.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((times(matrices, w) - w).abs().square().sum(), w)
    torch.testing.assert_close(2 * times(normal, u), gradient)


def test_normal_matrices_are_scaled_down_to_the_eigenvalue_allowed_and_no_others():
    noise = torch.zeros(4, SIZE, SIZE, dtype=torch.complex64)
    noise[:, 10:22, 10:22] = random_complex(4, 12, 12).to(noise.dtype)
    centre = crafted(SIZE, SIZE, (10, 22, 10, 22))
    normal = inconsistency_normal(calibrate(noise, centre, regularisation=1e-6))
    found = bounded(normal)
    assert float(torch.linalg.eigvalsh(normal)[..., -1].max()) > 5
    assert float(torch.linalg.eigvalsh(found)[..., -1].max()) == pytest.approx(2, rel=1e-5)
    torch.testing.assert_close(found / found[0, 0, 0, 0], normal / normal[0, 0, 0, 0])
    half = found / 2
    assert bounded(half) is half


def test_few_positions_are_enough_for_the_largest_eigenvalue():
    noise = torch.zeros(3, 256, 192, dtype=torch.complex64)
    noise[:, 120:136, 88:104] = random_complex(3, 16, 16).to(noise.dtype)
    centre = crafted(256, 192, (120, 136, 88, 104))
    found = bounded(inconsistency_normal(calibrate(noise, centre, regularisation=1e-6)))
    assert float(torch.linalg.eigvalsh(found)[..., -1].max()) == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("shape", [(4, 5), (5, 3)])
def test_consistent_images_solve_the_normal_equations(shape):
    matrices = random_complex(*shape, 2, 2)
    normal = inconsistency_normal(matrices)
    mask = torch.rand(shape, generator=seeded(3)) < 0.5
    kspace = random_complex(2, *shape, seed=4) * mask
    n = 2 * shape[0] * shape[1]
    columns = []
    for unit in torch.eye(n, dtype=torch.complex128).reshape(n, 2, *shape):
        defect = times(matrices.mH, times(matrices, unit) - unit)
        defect -= times(matrices, unit) - unit
        columns.append((sample_adjoint(sample(unit, mask), mask) + defect).reshape(-1))
    right = sample_adjoint(kspace, mask).reshape(-1)
    exact = torch.linalg.solve(torch.stack(columns, 1), right).reshape(2, *shape)
    found = consistent_image(kspace, mask, normal, iterations=500)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-8 * float(exact.abs().max()))


def test_consistent_images_of_consistent_data_are_left_alone():
    kspace = random_complex(2, 6, 6)
    zero = torch.zeros(6, 6, 2, 2, dtype=torch.complex128)
    found = consistent_image(kspace, everything(6, 6), zero, iterations=5)
    torch.testing.assert_close(found, ifft2c(kspace), rtol=1e-12, atol=1e-12)


def test_each_iteration_lowers_the_objective(full):
    mask = CartesianRandom(3, 0.25).mask((SIZE, SIZE), seeded(1))
    kspace = full.kspace * mask
    matrices = calibrate(kspace, mask)
    normal = inconsistency_normal(matrices)

    def objective(iterations):
        u = consistent_image(kspace, mask, normal, iterations)
        data = (sample(u, mask) - kspace).abs().square().sum()
        return float(data + (times(matrices, u) - u).abs().square().sum())

    values = [objective(n) for n in range(6)]
    assert all(after < before for before, after in pairwise(values))


def test_self_consistency_improves_on_zero_filling(full):
    mask = CartesianRandom(2, 0.25).mask((SIZE, SIZE), seeded(1))
    kspace = full.kspace * mask
    found = consistent_image(kspace, mask, inconsistency_normal(calibrate(kspace, mask)), 16)
    psnr = score(full.reference[None], rss(found)[None]).psnr
    assert psnr > score(full.reference[None], rss(ifft2c(kspace))[None]).psnr + 3


def crafted(rows, columns, *boxes):
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for top, bottom, left, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (crafted(24, 20, (0, 24, 8, 13)), (0, 24, 8, 13)),  # a Cartesian band
        (crafted(24, 20, (0, 24, 8, 13), (0, 24, 15, 16)), (0, 24, 8, 13)),  # and a column apart
        (crafted(7, 9, (2, 5, 3, 6)), (2, 5, 3, 6)),  # odd sizes
        (crafted(9, 7, (0, 9, 3, 4)), (0, 9, 3, 4)),  # a single column
        (crafted(8, 8, (0, 8, 0, 8)), (0, 8, 0, 8)),  # everything
        (crafted(5, 6, (0, 5, 0, 6)), (0, 5, 0, 6)),
        (crafted(8, 8, (4, 5, 4, 5)), (4, 5, 4, 5)),  # the zero frequency alone
        (crafted(8, 8, (0, 8, 0, 4)), (4, 4, 4, 4)),  # not even that
        (crafted(8, 8, (2, 7, 2, 7), (0, 8, 4, 5)), (2, 7, 2, 7)),  # square before long
    ],
)
def test_the_fully_sampled_centre_of_crafted_masks_is_found(mask, expected):
    assert fully_sampled_centre(mask) == expected


@pytest.mark.parametrize("shape", [(32, 32), (33, 40), (41, 36)])
@pytest.mark.parametrize(
    "sampling", [PoissonDisc(3, 8), Radial(16), CartesianRandom(3, 0.2)], ids=repr
)
def test_the_fully_sampled_centre_is_sampled_and_cannot_grow(sampling, shape):
    mask = sampling.mask(shape, seeded())
    top, bottom, left, right = fully_sampled_centre(mask)
    assert top <= shape[0] // 2 < bottom
    assert left <= shape[1] // 2 < right
    assert mask[top:bottom, left:right].all()
    sides = [(top - 1, top, left, right), (bottom, bottom + 1, left, right)]
    sides += [(top, bottom, left - 1, left), (top, bottom, right, right + 1)]
    for a, b, c, d in sides:
        outside = a < 0 or b > shape[0] or c < 0 or d > shape[1]
        assert outside or not mask[a:b, c:d].all()


@pytest.mark.parametrize(
    ("mask", "size"),
    [
        (crafted(SIZE, SIZE, (0, SIZE, 15, 18)), "32 x 3"),
        (crafted(SIZE, SIZE, (0, SIZE, 0, 10)), "0 x 0"),
    ],
)
def test_a_centre_smaller_than_the_kernel_is_refused(full, mask, size):
    needed = rf"centre of 5 x 5 positions was needed .* has {size}; sample more of the centre"
    with pytest.raises(InputError, match=needed):
        calibrate(full.kspace * mask, mask)


def test_the_low_resolution_phase_is_that_of_the_windowed_centre(full):
    mask = crafted(SIZE, SIZE, (12, 21, 11, 20))
    # A Hann window of 9 positions without its zeros.
    hann = torch.sin(torch.pi * torch.arange(1, 10) / 10).square()
    weights = torch.zeros(SIZE, SIZE)
    weights[12:21, 11:20] = hann[:, None] * hann[None, :]
    image = ifft2c(full.kspace * weights)
    found = low_resolution_phase(full.kspace, mask)
    torch.testing.assert_close(found.abs(), torch.ones(4, SIZE, SIZE))
    torch.testing.assert_close(found * image.abs(), image, rtol=0, atol=1e-6)


def test_the_low_resolution_phase_removes_nearly_all_of_the_phase_of_smooth_coil_images(full):
    mask = crafted(SIZE, SIZE, (0, SIZE, 11, 22))
    coil_images = ifft2c(full.kspace)
    turned = coil_images * low_resolution_phase(full.kspace * mask, mask).conj()
    assert turned.imag.norm() < 0.3 * turned.real.norm()
    assert coil_images.imag.norm() > 0.5 * coil_images.real.norm()


@pytest.mark.parametrize("mask", [crafted(8, 8, (0, 8, 0, 3)), crafted(8, 8, (3, 6, 3, 6))])
def test_the_low_resolution_phase_is_one_where_the_image_is_zero(mask):
    kspace = torch.zeros(2, 8, 8, dtype=torch.complex64)
    assert torch.equal(low_resolution_phase(kspace, mask), torch.ones_like(kspace))


@pytest.mark.parametrize("shape", [(40, 33), (90, 128)])
def test_the_map_towards_consistency_is_the_inverse_at_every_pixel(full, shape):
    kernels = fitted_kernels(full.kspace, everything())
    found = towards_consistency(kernels, shape, 0.7)
    # The exact one: K on the fine grid from the kernels, and one inverse a pixel.
    offsets = torch.arange(KERNEL) - KERNEL // 2
    waves = [
        torch.exp(-2j * torch.pi * offsets[:, None] * ((torch.arange(n) - n // 2) / n).double())
        for n in shape
    ]
    matrices = torch.einsum("oiab,ay,bx->yxoi", kernels, *waves)
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype)
    exact = torch.linalg.inv(eye + 0.7 * inconsistency_normal(matrices))
    assert float((found - exact).abs().max()) < 1e-3
    eigenvalues = torch.linalg.eigvalsh(found)
    assert float(eigenvalues.min()) > -1e-3
    assert float(eigenvalues.max()) < 1 + 1e-3


@pytest.mark.parametrize("shape", [(40, 33), (90, 128), (7, 6), (8, 100)])
def test_the_normal_matrices_of_kernels_are_those_of_their_transform(full, shape):
    kernels = fitted_kernels(full.kspace, everything())
    exact = inconsistency_normal(_image_domain(kernels, shape)).to(torch.complex64)
    found = normal_of(kernels, shape)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6 * float(exact.abs().max()))
    torch.testing.assert_close(found, found.mH, rtol=0, atol=0)
