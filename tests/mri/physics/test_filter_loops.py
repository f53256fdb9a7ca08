"""The compiled transforms give what the products of matrices give, with every derivative."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from applications.mri.physics import filter_loops
from applications.mri.physics.wavelets import Wavelets

SIZES = [(32, 48), (33, 47), (5, 6), (1, 16), (1, 1), (100, 90)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Small images go through the loops too; it grows by one a call of them."""
    calls: list[int] = []

    def counted(loop: Callable[..., None], *rest: Any) -> None:
        def once(*given: Any) -> None:
            calls.append(1)
            loop(*given)

        in_parts(once, *rest)

    in_parts = filter_loops.in_parts
    monkeypatch.setattr(filter_loops, "_LARGE", 1)
    monkeypatch.setattr(filter_loops, "in_parts", counted)
    return calls


def random(*shape: int, dtype: torch.dtype = torch.complex64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def exact(wavelets: Wavelets, images: Tensor) -> list[Tensor]:
    """By matrices, in twice the precision, which the loops do not take."""
    wide = torch.complex128 if images.is_complex() else torch.float64
    return [band.float() for band in wavelets.forward(images.to(wide))]


def close(one: list[Tensor], other: list[Tensor], tolerance: float = 2e-6) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shift", [(0, 0), (3, 7), (31, 200)])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_both_transforms_are_those_of_the_matrices(
    calls: list[int], shape: tuple[int, int], shift: tuple[int, int]
) -> None:
    """Of any size and shift."""
    images, wavelets = random(2, *shape), Wavelets(shape, shift=shift)
    bands = wavelets.forward(images)
    close(bands, exact(wavelets, images))
    scaled = [(2 + i) * band for i, band in enumerate(bands)]
    found = wavelets.adjoint(scaled, of_complex=True)
    expected = wavelets.adjoint([band.double() for band in scaled], of_complex=True)
    torch.testing.assert_close(found, expected.to(found), rtol=0, atol=2e-5)
    assert len(calls) == 2 * min(torch.get_num_threads(), 2)


@pytest.mark.parametrize("name", ["haar", "db3", "sym5", "coif2"])
def test_every_orthogonal_filter_is_taken(calls: list[int], name: str) -> None:
    """Of 2, 6, 10 and 12 taps."""
    images, wavelets = random(1, 40, 56), Wavelets((40, 56), shift=(5, 1), name=name)
    bands = wavelets.forward(images)
    close(bands, exact(wavelets, images))
    torch.testing.assert_close(wavelets.adjoint(bands, of_complex=True), images, rtol=0, atol=2e-6)
    assert calls


@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 3)])
def test_real_images_and_batches_of_any_shape(calls: list[int], batch: tuple[int, ...]) -> None:
    """Bands have the axes of the matrices' bands."""
    wavelets = Wavelets((24, 18), shift=(1, 2))
    for dtype in (torch.float32, torch.complex64):
        images = random(*batch, 24, 18, dtype=dtype)
        bands = wavelets.forward(images)
        close(bands, exact(wavelets, images))
        back = wavelets.adjoint(bands, of_complex=images.is_complex())
        torch.testing.assert_close(back, images, rtol=0, atol=2e-6)
    assert calls


def test_views_are_read_as_they_are(calls: list[int]) -> None:
    """Conjugate, negative, strided and expanded images and bands."""
    images, wavelets = random(3, 24, 18), Wavelets((24, 18))
    views = [images.conj(), images.flip(0), images[:1].expand(3, 24, 18)]
    views += [images.mT.contiguous().mT, images.conj().imag]  # the last is lazily negated
    for view in views:
        close(wavelets.forward(view), exact(wavelets, view))
    bands = wavelets.forward(images)
    strided = [band.mT.contiguous().mT for band in bands]
    torch.testing.assert_close(wavelets.adjoint(strided), wavelets.adjoint(bands))
    assert calls


def test_threads_share_the_images(calls: list[int]) -> None:
    """More of them than there are images, too."""
    images, wavelets = random(3, 24, 18), Wavelets((24, 18))
    expected, before = wavelets.forward(images), torch.get_num_threads()
    try:
        for threads in (2, 5):
            torch.set_num_threads(threads)
            found = wavelets.forward(images)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(before)
    assert len(calls) == min(before, 3) + 2 + 3


def test_what_is_not_finite_stays_so(calls: list[int]) -> None:
    """A NaN of one image is in that image alone."""
    images, wavelets = random(2, 24, 18, dtype=torch.float32), Wavelets((24, 18))
    images[1, 2, 3] = float("nan")
    bands = wavelets.forward(images)
    assert all(bool(torch.isfinite(band[0]).all()) for band in bands)
    assert not bool(torch.isfinite(bands[-1][1]).all())
    back = wavelets.adjoint(bands)
    assert not bool(torch.isfinite(back[1, 2, 3]))
    assert calls


def everything(wavelets: Wavelets) -> list[Tensor]:
    """Both transforms backward, twice, forward, both, and for batches of images and cotangents."""
    images, direction = random(2, 20, 18), random(2, 20, 18, seed=1)

    def there_and_back(u: Tensor) -> Tensor:
        low, *details = wavelets.forward(u)
        return wavelets.adjoint([low, *(band.pow(3) for band in details)], of_complex=True)

    def cost(u: Tensor) -> Tensor:
        return there_and_back(u).abs().pow(2).sum()

    u = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cost(u), u, create_graph=True)
    (second,) = torch.autograd.grad((gradient * direction.conj()).real.sum(), u)
    forward = torch.func.jvp(there_and_back, (images,), (direction,))[1]
    both = torch.func.jvp(torch.func.grad(cost), (images,), (direction,))[1]
    many = torch.func.vmap(there_and_back)(torch.stack([images, direction]))
    inside = torch.func.vmap(there_and_back, in_dims=1)(torch.stack([images, direction], 1))
    cotangents = torch.stack([images, 2 * direction])
    (rows,) = torch.autograd.grad(there_and_back(u), u, cotangents, is_grads_batched=True)
    low, *details = wavelets.forward(images)

    def of_low(band: Tensor) -> Tensor:  # a batch of one band alone
        return wavelets.adjoint([band, *details], of_complex=True)

    mixed = torch.func.vmap(of_low)(torch.stack([low, 2 * low]))
    part = torch.func.jvp(of_low, (low,), (low,))[1]
    v = images.clone().requires_grad_()
    (finest,) = torch.autograd.grad(wavelets.forward(v)[-1].square().sum(), v)
    return [gradient.detach(), second, forward, both, many, inside, rows, mixed, part, finest]


def test_every_derivative_is_that_of_the_matrices(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of shifted, padded images."""
    wavelets = Wavelets((20, 18), shift=(3, 5))
    looped = everything(wavelets)
    count = len(calls)
    assert count
    monkeypatch.setattr(filter_loops, "_LARGE", 1 << 60)
    close(looped, everything(wavelets), tolerance=2e-3)
    assert len(calls) == count


def test_other_types_and_few_images_go_by_matrices(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """float64 keeps its precision, and what is small does without numba."""
    wavelets = Wavelets((24, 18))
    images = random(2, 24, 18, dtype=torch.complex128)
    back = wavelets.adjoint(wavelets.forward(images), of_complex=True)
    torch.testing.assert_close(back, images, rtol=0, atol=1e-13)
    monkeypatch.undo()
    wavelets.forward(random(2, 24, 18))
    assert not calls


def test_export_sees_torch_alone(calls: list[int]) -> None:
    """A program has no call of the loops, so that it runs where numba is not."""

    class Shrunk(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            wavelets = Wavelets((24, 18))
            return wavelets.adjoint([0.5 * b for b in wavelets.forward(images)], of_complex=True)

    images = random(2, 24, 18)
    program = torch.export.export(Shrunk(), (images,))
    count = len(calls)
    torch.testing.assert_close(program.module()(images), 0.5 * images, rtol=0, atol=2e-6)
    assert len(calls) == count
    assert "Analysis" not in str(program.graph)
