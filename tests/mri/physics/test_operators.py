import numpy as np
import pytest
import torch

from applications.errors import InputError
from applications.mri.physics.operators import (
    between,
    centre_crop,
    fft2c,
    ifft2c,
    in_units_of,
    rss,
    sample,
    sample_adjoint,
)

SHAPES = [(6, 8), (5, 8), (6, 7), (5, 7), (1, 3)]


def draw(*shape, seed=0):
    return torch.randn(
        *shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed)
    )


def real_inner(a, b):
    return float(torch.vdot(a.flatten(), b.flatten()).real)


@pytest.mark.parametrize("shape", SHAPES)
def test_fft2c_is_the_centred_orthonormal_transform_of_numpy(shape):
    image = draw(3, *shape)
    axes = (-2, -1)
    found = np.fft.fftshift(
        np.fft.fft2(np.fft.ifftshift(image.numpy(), axes=axes), norm="ortho"), axes=axes
    )
    np.testing.assert_allclose(fft2c(image).numpy(), found, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_point_at_the_centre_becomes_a_constant_and_a_constant_a_point(shape):
    rows, columns = shape
    point = torch.zeros(shape, dtype=torch.complex128)
    point[rows // 2, columns // 2] = 1
    flat = torch.full(shape, (rows * columns) ** -0.5, dtype=torch.complex128)
    torch.testing.assert_close(fft2c(point), flat, rtol=0, atol=1e-14)
    torch.testing.assert_close(fft2c(flat), point, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_fft2c_is_unitary_and_ifft2c_its_inverse_and_adjoint(shape):
    u, f = draw(2, *shape), draw(2, *shape, seed=1)
    torch.testing.assert_close(ifft2c(fft2c(u)), u, rtol=0, atol=1e-13)
    torch.testing.assert_close(fft2c(ifft2c(f)), f, rtol=0, atol=1e-13)
    assert real_inner(fft2c(u), fft2c(u)) == pytest.approx(real_inner(u, u), rel=1e-12)
    assert real_inner(fft2c(u), f) == pytest.approx(real_inner(u, ifft2c(f)), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_sampling_and_its_adjoint_pass_the_dot_product_test(shape):
    u, f = draw(2, 3, *shape), draw(2, 3, *shape, seed=1)
    bits = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(2)) < 0.5
    for mask in (bits[0, 0], bits):
        left = real_inner(sample(u, mask), f)
        assert left == pytest.approx(real_inner(u, sample_adjoint(f, mask)), rel=1e-12, abs=1e-14)


def test_sampling_is_the_transform_where_the_mask_is_true_and_zero_elsewhere():
    u, mask = draw(3, 5, 6), torch.zeros(5, 6, dtype=torch.bool)
    mask[2, 1:4] = True
    torch.testing.assert_close(sample(u, mask)[:, mask], fft2c(u)[:, mask], rtol=0, atol=0)
    assert not sample(u, mask)[:, ~mask].any()


def test_root_sum_of_squares_matches_numpy_for_complex_and_real_images():
    u = draw(2, 4, 5, 6)
    np.testing.assert_allclose(rss(u), np.sqrt((np.abs(u.numpy()) ** 2).sum(-3)), rtol=1e-14)
    np.testing.assert_allclose(rss(u.real), np.sqrt((u.real.numpy() ** 2).sum(-3)), rtol=1e-14)


def test_root_sum_of_squares_has_gradient_zero_where_all_coils_vanish():
    u = draw(4, 5, 6)
    u[:, 2, 3] = 0
    u.requires_grad_()
    (gradient,) = torch.autograd.grad(rss(u).sum(), u)
    expected = (u / rss(u)).detach()
    expected[:, 2, 3] = 0
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_root_sum_of_squares_keeps_nan_visible():
    u = draw(2, 3, 3)
    u[0, 1, 1] = torch.nan
    assert torch.isnan(rss(u)[1, 1])


@pytest.mark.parametrize(("n", "m"), [(8, 4), (8, 5), (7, 4), (7, 5)])
def test_a_centre_crop_starts_where_fastmri_starts_it(n, m):
    image = torch.arange(n * n).reshape(1, n, n)
    first = (n - m) // 2
    assert torch.equal(centre_crop(image, (m, m)), image[:, first : first + m, first : first + m])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fft2c(torch.zeros(3)), r"image must have shape \(\.\.\., rows, columns\)"),
        (lambda: ifft2c(torch.zeros(3, 0)), r"kspace must .* got \(3, 0\)"),
        (lambda: rss(torch.zeros(3, 4)), r"coil_images must .*unsqueeze"),
        (lambda: sample(draw(3, 4), torch.ones(3, 4)), r"mask must be boolean, got torch.float32"),
        (
            lambda: sample(draw(2, 2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)),
            r"mask must have shape \(3, 4\), or 4 axes .* got \(2, 3, 4\)",
        ),
        (
            lambda: sample_adjoint(draw(3, 4), torch.ones(4, 3, dtype=torch.bool)),
            r"mask must have shape \(3, 4\)",
        ),
        (lambda: centre_crop(draw(3, 4), (5, 2)), r"at least \(5, 2\) is needed, got \(3, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 1.7, torch.tensor(0.3, dtype=torch.float64)])
def test_what_lies_between_two_images_is_a_line_through_both(weight):
    one, other = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    torch.testing.assert_close(between(one, other, weight), one + weight * (other - one))


def test_what_lies_between_is_differentiated_in_all_of_it():
    weight = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    ends = [draw(2, 3, seed=k).requires_grad_() for k in (0, 1)]
    assert torch.autograd.gradcheck(between, (*ends, weight))
    assert torch.autograd.gradgradcheck(between, (*ends, weight))


@pytest.mark.parametrize("factor", [1e-12, 0.2, 1e9])
@pytest.mark.parametrize(("image", "apart"), [((1, 2, 4, 6), (3, 4, 5)), ((2, 4, 6), (3, 5))])
def test_a_calibration_is_brought_to_the_units_of_the_image(factor, image, apart):
    """By common columns; else by those between."""
    kspace = torch.ones(2, 5, 8, dtype=torch.complex64) * 1j
    measured, known = torch.zeros(8), torch.zeros(8)
    measured[list(image)], known[list(apart)] = 1, 1
    found = in_units_of(kspace * measured, factor * kspace * known)
    torch.testing.assert_close(found, kspace * known)
    nothing = torch.zeros_like(kspace)
    assert torch.equal(in_units_of(nothing, kspace), kspace)
    assert torch.equal(in_units_of(kspace, nothing), nothing)
