"""The compiled loop over pixels gives what torch's sums give, with every derivative."""

import threading

import pytest
import torch
from torch import Tensor

from applications.mri.physics import products
from applications.mri.physics.products import times


@pytest.fixture(autouse=True)
def looped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small slices go through the loop too."""
    monkeypatch.setattr(products, "_LARGE", 1)


def problem(*batch: int, coils: int = 3, rows: int = 7, columns: int = 5) -> tuple[Tensor, Tensor]:
    """Hermitian matrices, pixels together in memory, and coil images."""
    g = torch.Generator().manual_seed(coils)
    shape = (*batch, coils, coils, rows, columns)
    planes = torch.randn(shape, dtype=torch.complex64, generator=g)
    planes = (planes + planes.transpose(-4, -3).conj()).resolve_conj()
    state = torch.randn(*batch, coils, rows, columns, dtype=torch.complex64, generator=g)
    return planes.movedim((-4, -3), (-2, -1)), state


def exact(matrices: Tensor, state: Tensor) -> Tensor:
    """The products by torch, in twice the precision."""
    wide = matrices.to(torch.complex128), state.to(torch.complex128)
    return torch.einsum("...yxoi,...iyx->...oyx", *wide)


def went_through_the_loop(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one a call of the loop."""
    calls: list[int] = []
    loop = products.compiled(products._rows)
    monkeypatch.setattr(
        products, "compiled", lambda _: lambda *given: (calls.append(1), loop(*given))
    )
    return calls


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize(("coils", "rows", "columns"), [(1, 1, 1), (2, 1, 6), (5, 4, 3)])
def test_loop_gives_the_products(
    monkeypatch: pytest.MonkeyPatch, batch: tuple[int, ...], coils: int, rows: int, columns: int
) -> None:
    """Of any shape, once a slice."""
    matrices, state = problem(*batch, coils=coils, rows=rows, columns=columns)
    calls = went_through_the_loop(monkeypatch)
    torch.testing.assert_close(
        times(matrices, state).to(torch.complex128), exact(matrices, state), rtol=1e-5, atol=1e-5
    )
    assert len(calls) == torch.Size(batch).numel() * min(torch.get_num_threads(), rows)


def test_views_of_the_state_are_read_as_they_are() -> None:
    """Conjugate, negative, strided and expanded ones."""
    matrices, state = problem()
    views = [state.conj(), state.flip(1), state[:1].expand(3, 7, 5), state.mT.contiguous().mT]
    negative = torch.complex(state.real, state.imag).conj().imag  # lazily negated
    views.append(torch.complex(state.real, negative))
    for view in views:
        torch.testing.assert_close(
            times(matrices, view), exact(matrices, view).to(torch.complex64), rtol=1e-5, atol=1e-5
        )


def test_threads_share_the_rows() -> None:
    """Two of them, more than there are rows, and callers of their own at the same time."""
    matrices, state = problem(rows=2)
    expected, before = times(matrices, state), torch.get_num_threads()
    try:
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(times(matrices, state), expected)
    finally:
        torch.set_num_threads(before)
    found: list[Tensor] = []
    callers = [
        threading.Thread(target=lambda: found.append(times(matrices, state))) for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4
    assert all(torch.equal(one, expected) for one in found)


def test_what_is_not_finite_stays_so() -> None:
    """A NaN and an infinity of one pixel are in that pixel alone."""
    matrices, state = problem()
    state[1, 2, 3], state[0, 4, 4] = float("nan"), float("inf")
    found = torch.isfinite(times(matrices, state)).all(0)
    assert not found[2, 3]
    assert not found[4, 4]
    assert int((~found).sum()) == 2


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's sums, too
def test_every_derivative_is_that_of_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward, twice, forward, both, and a batch of cotangents."""
    matrices, state = problem()
    _, direction = problem(coils=3, rows=7, columns=5)
    calls = went_through_the_loop(monkeypatch)

    def cost(u: Tensor) -> Tensor:
        return times(matrices, u).abs().pow(3).sum()

    def everything() -> list[Tensor]:
        u = state.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cost(u), u, create_graph=True)
        (second,) = torch.autograd.grad((gradient * direction.conj()).real.sum(), u)
        forward = torch.func.jvp(lambda x: times(matrices, x), (state,), (direction,))[1]
        both = torch.func.jvp(torch.func.grad(cost), (state,), (direction,))[1]
        many = torch.func.vmap(lambda x: times(matrices, x))(torch.stack([state, direction]))
        cotangents = torch.stack([state, 2 * direction])
        (rows,) = torch.autograd.grad(times(matrices, u), u, cotangents, is_grads_batched=True)
        return [gradient.detach(), second, forward, both, many, rows]

    looped = everything()
    assert calls
    monkeypatch.setattr(products, "_LARGE", 1 << 60)
    count = len(calls)
    for one, other in zip(looped, everything(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len(calls) == count


def test_derivatives_of_the_matrices_are_those_of_the_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By requires_grad, and by a transform that nothing shows in."""
    matrices, state = problem()

    def cost(m: Tensor) -> Tensor:
        return times(m, state).abs().pow(2).sum()

    def both() -> list[Tensor]:
        leaf = matrices.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cost(leaf), leaf)
        moved = torch.func.jvp(lambda m: times(m, state), (matrices,), (matrices,))[1]
        return [gradient, torch.func.grad(cost)(matrices), moved]

    looped = both()
    monkeypatch.setattr(products, "_LARGE", 1 << 60)
    for one, other in zip(looped, both(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_the_loop_cannot_read_is_summed() -> None:
    """Other types and layouts, and matrices that are shared by a batch."""
    matrices, state = problem()
    wide = matrices.to(torch.complex128), state.to(torch.complex128)
    torch.testing.assert_close(times(*wide), exact(*wide))
    together = matrices.contiguous()  # coils together in memory
    torch.testing.assert_close(times(together, state), times(matrices, state), rtol=1e-5, atol=1e-5)
    batch = torch.stack([state, 2 * state])
    torch.testing.assert_close(
        times(matrices, batch)[1], 2 * times(matrices, state), rtol=1e-5, atol=1e-5
    )
    conjugate = matrices.conj()
    torch.testing.assert_close(
        times(conjugate, state), times(matrices, state.conj()).conj(), rtol=1e-5, atol=1e-5
    )


def test_export_sees_torch_alone() -> None:
    """A program has no call of the loop, so that it runs where numba is not."""

    class Product(torch.nn.Module):
        def forward(self, matrices: Tensor, state: Tensor) -> Tensor:
            return times(matrices, state)

    matrices, state = problem()
    program = torch.export.export(Product(), (matrices, state))
    torch.testing.assert_close(
        program.module()(matrices, state), times(matrices, state), rtol=1e-5, atol=1e-5
    )
    assert "Looped" not in str(program.graph)
