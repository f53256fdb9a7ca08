"""The Riccati sweep: a Newton step of all controls in one pass, backwards; MODEL of the docs.

In homogeneous coordinates (x, 1), with F and H of `linearisation`, the value of a state is
(x, 1)^T P (x, 1) / 2, the gradient s a column of P, and a step of the sweep is

    Q = H + F^T P F,    K = -Q_cc^{-1} Q_cx,    P = Q_xx + Q_xc K        (c: the step's control)

whose last column of K is the change k of the control. Dunn & Bertsekas (1989),
doi:10.1007/BF00940581; Mayne (1966), doi:10.1080/00207176608921369.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from bilevel.control.riccati.blocks import block_of, joined_steps, padded
from bilevel.control.riccati.box import box_minimum
from bilevel.control.riccati.linearisation import Hessians, Linearisation


@dataclass(frozen=True, eq=False)
class Model:
    """The linear-quadratic problems that a Newton step solves.

    Attributes:
        maps: F_t, ``(b, T, N, N + m)`` with N = n + q + 1.
        steps: H_t, ``(b, T, N + m, N + m)``.
        terminal: P_T, ``(b, N, N)``.
        start: dx(0)/dw, ``(b, n + q, q)``.
        first: second derivative of what `start` is the first of, ``(b, q, q)``.
        low: what a step's control may change by at least, ``(b, T, m)``; None for no bounds.
        high: and at most.
        low_shared: the same of what is shared, ``(b, q)``.
        high_shared: and at most.
    """

    maps: Tensor
    steps: Tensor
    terminal: Tensor
    start: Tensor
    first: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    low_shared: Tensor | None = None
    high_shared: Tensor | None = None

    def at(self, i: Tensor) -> "Model":
        """Some of the problems."""
        parts: list[Any] = [x if x is None else x[i] for x in self._parts()]
        return Model(*parts)

    def repeated(self, n: int) -> "Model":
        """Each problem n times, one after another."""
        parts: list[Any] = [x if x is None else x.repeat_interleave(n, 0) for x in self._parts()]
        return Model(*parts)

    def _parts(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]

    def scale(self) -> Tensor:
        """The largest second derivative of each problem; 1 where there is none."""
        n = self.terminal.shape[1] - 1
        largest = self.terminal[:, :n, :n].abs().amax((1, 2))
        if self.steps.shape[1]:
            own = self.steps.diagonal(dim1=2, dim2=3).abs().amax((1, 2))
            largest = torch.maximum(largest, own)
        return torch.where(largest > 0, largest, 1.0)


def model_of(point: Linearisation, second: Hessians, limits: Any = None) -> Model:
    """The problem of a Newton step at a point."""
    bounds = () if limits is None else limits
    return Model(point.maps, second.steps, second.terminal, point.start, second.start, *bounds)


@dataclass(frozen=True, eq=False)
class Gains:
    """What a sweep finds; the change of a control is k + K dx.

    Attributes:
        values: P_0, ..., P_T, ``(b, T + 1, N, N)``.
        gains: K_t and k_t beside, ``(b, T, m, N)``.
        factors: of Q_cc (of its free numbers), ``(b, T, m, m)``.
        free: which numbers of a step's control no bound holds; None without bounds.
        shared: the change of what is shared, ``(b, q)``.
        shared_factor: of its Hessian, ``(b, q, q)``.
        shared_free: as `free`.
        slope: derivative of the cost along the change, ``(b,)``; not positive.
        failed: t at which a Hessian is not positive definite, 0 for what is shared, -1 for none.
    """

    values: Tensor
    gains: Tensor
    factors: Tensor
    free: Tensor | None
    shared: Tensor
    shared_factor: Tensor
    shared_free: Tensor | None
    slope: Tensor
    failed: Tensor

    def replaced(self, i: Tensor, other: "Gains") -> "Gains":
        """With some of the problems from another sweep."""
        parts = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            parts.append(mine if mine is None else mine.index_copy(0, i, theirs))
        return Gains(*parts)

    def at(self, i: Tensor) -> "Gains":
        """Some of the problems."""
        parts: list[Any] = [getattr(self, field.name) for field in fields(self)]
        parts = [x if x is None else x[i] for x in parts]
        return Gains(*parts)


def backward(model: Model, shift: Tensor) -> Gains:
    """The sweep from T to 0, each Hessian of a control with `shift` added, and the start.

    Args:
        model: of b problems.
        shift: of each of them, ``(b,)``; with it the step is one of J + shift |change|^2 / 2.

    Returns:
        Changes and gains; only of use where nothing `failed`.
    """
    N, steps = model.terminal.shape[1], model.steps
    if bool(shift.any()) and steps.numel():
        steps = steps.clone()
        steps[:, :, N:, N:].diagonal(dim1=2, dim2=3).add_(shift.view(-1, 1, 1))
    b, horizon, both, _ = steps.shape
    if model.low is not None and model.high is not None and both > N:
        values, swept = _in_boxes(model.maps, steps, model.terminal, model.low, model.high)
        return _gathered(model, shift, values, swept)
    k = block_of(horizon, b * both * both) if both > N else 1
    if k == 1:
        values, *swept = _recursion(model.maps, steps, model.terminal)
        return _gathered(model, shift, values, swept)
    extra = -horizon % k
    maps, steps = padded(model.maps, steps, extra)
    inside = maps.reshape(-1, k, N, both), steps.reshape(-1, k, both, both)
    F, H = (x.view(b, -1, *x.shape[1:]) for x in joined_steps(*inside))
    ends, _, _, lost = _recursion(F, H, model.terminal)
    values, *swept = _recursion(*inside, ends[:, 1:].reshape(-1, N, N))
    # What only the joined steps show is said of the last step of their block.
    swept[2][:, -1] |= lost.flatten() * (swept[2] == 0).all(1)
    values, half, factors, info = (
        x[:, :k].reshape(b, -1, *x.shape[2:])[:, extra:] for x in (values, *swept)
    )
    return _gathered(model, shift, torch.cat([values, ends[:, -1:]], 1), (half, factors, info))


def _recursion(maps: Tensor, steps: Tensor, P: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P of every step, factors of Q_cc, Q_cx divided by them, and where there is none."""
    b, horizon, N, both = maps.shape
    values, halves, factors, info = [P], [], [], []
    Q = P.new_empty(b, both, both)
    Qxx, Qcx, Qcc = Q[:, :N, :N], Q[:, N:, :N], Q[:, N:, N:]
    every = zip(maps.unbind(1)[::-1], maps.mT.unbind(1)[::-1], steps.unbind(1)[::-1], strict=True)
    for F, transposed, H in every:
        torch.baddbmm(H, transposed, torch.bmm(P, F), out=Q)
        if both == N:
            P = Q.clone()
            values.append(P)
            continue
        factor, failed = torch.linalg.cholesky_ex(Qcc)
        half = torch.linalg.solve_triangular(factor, Qcx, upper=False)
        P = torch.baddbmm(Qxx, half.mT, half, alpha=-1)
        values.append(P)
        halves.append(half)
        factors.append(factor)
        info.append(failed)
    if not halves:
        m = both - N
        none = P.new_zeros(b, horizon, m, N), P.new_zeros(b, horizon, m, m)
        bad = torch.zeros(b, horizon, dtype=torch.int32, device=P.device)
        return torch.stack(values[::-1], 1), *none, bad
    parts = (torch.stack(x[::-1], 1) for x in (values, halves, factors, info))
    return tuple(parts)  # pyright: ignore[reportReturnType]


def _in_boxes(
    maps: Tensor, steps: Tensor, P: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same with bounds on each change."""
    N, values, stages = maps.shape[2], [P], []
    for t in range(maps.shape[1] - 1, -1, -1):
        Q = torch.baddbmm(steps[:, t], maps[:, t].mT, torch.bmm(P, maps[:, t]))
        Qxx, Qcx, Qcc = Q[:, :N, :N], Q[:, N:, :N], Q[:, N:, N:]
        P, stage = _boxed(Qxx, Qcx, Qcc, low[:, t], high[:, t])
        values.append(P)
        stages.append(stage)
    swept = tuple(torch.stack(part, 1) for part in zip(*stages[::-1], strict=True))
    return torch.stack(values[::-1], 1), swept


def _boxed(Qxx: Tensor, Qcx: Tensor, Qcc: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Any]:
    """One step of the sweep with bounds: k the minimum in the box, K zero where one holds."""
    N = Qxx.shape[1]
    least = box_minimum(Qcc, Qcx[:, :, N - 1], low, high)
    gain = -torch.cholesky_solve(Qcx * least.free.unsqueeze(2), least.factor)
    gain = torch.cat([gain[:, :, : N - 1], least.x.unsqueeze(2)], 2)
    cross = Qcx.mT @ gain
    P = Qxx + cross + cross.mT + gain.mT @ Qcc @ gain
    slope = (Qcx[:, :, N - 1] * least.x).sum(1)
    return P, (gain, least.factor, least.failed.int(), least.free, slope)


def _gathered(model: Model, shift: Tensor, values: Tensor, swept: Sequence[Tensor]) -> Gains:
    P = values[:, 0]
    b, N = P.shape[:2]
    horizon, m = model.steps.shape[1], model.steps.shape[2] - N
    free = None
    slope = P.new_zeros(b)
    failed = torch.full((b,), -1, device=P.device)
    if horizon and m:
        first, factors, info = swept[:3]
        if len(swept) > 3:
            gains, free = first, swept[3]
            slope = swept[4].sum(1)
        else:
            gains = -torch.linalg.solve_triangular(factors.mT, first, upper=True)
            slope = -first[..., -1].square().sum((1, 2))
        bad = info != 0
        # Backwards the last one failed first: what comes after it in the sweep means nothing.
        last = horizon - bad.flip(1).int().argmax(1)
        failed = torch.where(bad.any(1), last, failed)
    else:
        gains, factors = P.new_zeros(b, horizon, m, N), P.new_zeros(b, horizon, m, m)
    shared = _shared(model, shift, P)
    change, factor, held, bad, also = shared
    failed = torch.where((failed < 0) & bad, 0, failed)
    return Gains(values, gains, factors, free, change, factor, held, slope + also, failed)


def _shared(model: Model, shift: Tensor, P: Tensor) -> tuple[Any, ...]:
    """The change of what is shared: a Newton step on the value of the start."""
    start, q = model.start, model.start.shape[2]
    b, nx = P.shape[0], P.shape[1] - 1
    if not q:
        none = P.new_zeros(b, 0)
        fine = torch.zeros(b, dtype=torch.bool, device=P.device)
        held = None if model.low is None else none.bool()
        return none, P.new_zeros(b, 0, 0), held, fine, P.new_zeros(b)
    slope = (start.mT @ P[:, :nx, nx:]).squeeze(2)
    identity = torch.eye(q, dtype=P.dtype, device=P.device)
    H = start.mT @ P[:, :nx, :nx] @ start + model.first + shift.view(-1, 1, 1) * identity
    H = (H + H.mT) / 2
    if model.low_shared is not None and model.high_shared is not None:
        least = box_minimum(H, slope, model.low_shared, model.high_shared)
        also = (slope * least.x).sum(1)
        return least.x, least.factor, least.free, least.failed, also
    factor, info = torch.linalg.cholesky_ex(H)
    change = -torch.cholesky_solve(slope.unsqueeze(2), factor).squeeze(2)
    return change, factor, None, info != 0, (slope * change).sum(1)
