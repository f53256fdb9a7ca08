"""Conjugate gradients and the Neumann series on several systems side by side.

The iterations of `krylov` and `inverses` with a scalar a column: vectors are matrices of one row a
column, and a column that is done stands still while the others go on. One product serves all.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel.linear import LinearResult
from bilevel.ritz import smallest_ritz
from bilevel.system import System, finite_columns


def conjugate_gradients(system: System, rtol: float, limit: int) -> LinearResult:
    """See `CG`.

    Args:
        system: with columns.
        rtol: of every column.
        limit: most steps.

    Returns:
        The record.
    """
    x, r, rhs_norm, start_norm = _begin(system)
    rr = _dots(r, r)
    p, pp, beta = r.clone(), rr, rr
    yy = yp = size = torch.zeros_like(rr)
    going, steps = rr >= 0, torch.zeros_like(rr, dtype=torch.int64)
    indefinite = ~going
    pivots: list[Tensor] = []
    ratios: list[Tensor] = []
    while True:
        norm = rr.sqrt()
        floor = system.unit * (rhs_norm + size * (start_norm + yy.sqrt()))
        going = going & (norm > torch.maximum(rtol * rhs_norm, floor))
        if len(pivots) == limit or not going.any():
            break
        if pivots:
            p.mul_(beta[:, None]).add_(r)
            ratios.append(beta)
        Ap = system.rows(system.apply(p.view(-1)))
        curvature = _dots(p, Ap)
        finite_columns(curvature, len(pivots) + 1)
        pivots.append(curvature / rr)
        size = torch.where(going, torch.maximum(size, curvature.abs() / pp), size)
        bent = going & (curvature <= 4 * system.eps * size * pp)
        indefinite, going = indefinite | bent, going & ~bent
        alpha = torch.where(going, rr / curvature, 0)
        x.addcmul_(alpha[:, None], p)
        r.addcmul_(alpha[:, None], Ap, value=-1)
        steps = steps + going
        previous, rr = rr, _dots(r, r)
        finite_columns(rr, len(pivots))
        beta = torch.where(going, rr / previous, 0)
        yy = yy + alpha * (2 * yp + alpha * pp)
        yp = beta * (yp + alpha * pp)
        pp = rr + beta * beta * pp
    return _result(
        system,
        x,
        norm,
        steps,
        rtol,
        floor,
        indefinite=indefinite.tolist(),
        find_ritz=partial(_smallest_ritz, pivots, ratios, (steps + indefinite).tolist()),
    )


def _smallest_ritz(pivots: list[Tensor], ratios: list[Tensor], counts: list[int]) -> float | None:
    """Smallest Ritz value of all columns, each with the `counts` pivots that are its own."""
    values = [[x.tolist() for x in part] for part in (pivots, ratios)]
    found = [
        smallest_ritz(
            [x[k] for x in values[0][:count]], [x[k] for x in values[1][: max(count - 1, 0)]]
        )
        for k, count in enumerate(counts)
    ]
    return min((x for x in found if x is not None), default=None)


def normal_equations(system: System, rtol: float, limit: int) -> LinearResult:
    """See `NormalCG`.

    Args:
        system: with columns.
        rtol: of every column.
        limit: most steps.

    Returns:
        The record.
    """
    x, r, rhs_norm, _ = _begin(system)
    p = system.rows(system.adjoint(r.view(-1))).clone()
    norm, ss, done = _norms(r), _dots(p, p), 0
    finite_columns(ss, 0)
    size, steps = torch.zeros_like(norm), torch.zeros_like(norm, dtype=torch.int64)
    going = norm > 0
    while True:
        floor = system.unit * (rhs_norm + size * _norms(x))
        stationary = ss.sqrt() <= 4 * system.eps * size * norm
        going = going & (norm > torch.maximum(rtol * rhs_norm, floor)) & ~stationary & (ss > 0)
        if done == limit or not going.any():
            break
        done, steps = done + 1, steps + going
        length = _norms(p)
        unit = p / torch.where(going, length, 1)[:, None]
        q = system.rows(system.apply(unit.view(-1)))
        qq = _dots(q, q)
        finite_columns(qq, done)
        size = torch.where(going, torch.maximum(size, qq.sqrt()), size)
        going = going & (qq > 0)
        alpha = torch.where(going, ss / (length * qq), 0)
        x.addcmul_(alpha[:, None], unit)
        r.addcmul_(alpha[:, None], q, value=-1)
        norm = _norms(r)
        s = system.rows(system.adjoint(r.view(-1)))
        previous, ss = ss, _dots(s, s)
        finite_columns(ss, done)
        p.mul_(torch.where(going, ss / previous, 0)[:, None]).add_(s)
    return _result(system, x, norm, steps, rtol, floor)


def neumann_series(system: System, rtol: float, terms: int, step: float) -> LinearResult:
    """See `Neumann`.

    Args:
        system: with columns.
        rtol: of every column.
        terms: most terms.
        step: factor.

    Returns:
        The record.
    """
    x, r, rhs_norm, _ = _begin(system)
    norm = _norms(r)
    size, steps = torch.zeros_like(norm), torch.zeros_like(norm, dtype=torch.int64)
    for term in range(1, terms + 1):
        going = norm > rtol * rhs_norm
        if not going.any():
            break
        steps = steps + going
        factor = (step * going.to(x.dtype))[:, None]
        x.addcmul_(factor, r)
        Ar = system.rows(system.apply(r.view(-1)))
        size = torch.where(going, torch.maximum(size, _norms(Ar) / norm), size)
        r = torch.addcmul(r, factor, Ar, value=-1)
        norm = _norms(r)
        finite_columns(norm, term)
    return _result(system, x, norm, steps, rtol, system.unit * (rhs_norm + size * _norms(x)))


def _begin(system: System) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First iterates, residuals, norms of the right-hand sides and of the iterates."""
    x, r, _ = system.begin()
    norms = (r.new_tensor(values) for values in (system.rhs_norms, system.start_norms))
    return system.rows(x), system.rows(r), *norms


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _norms(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=1)


def _result(
    system: System,
    x: Tensor,
    norm: Tensor,
    steps: Tensor,
    rtol: float,
    floor: Tensor,
    **more: Any,
) -> LinearResult:
    norms = torch.maximum(norm, floor).tolist()
    return system.result(
        x.view(-1), norms, steps.tolist(), rtol=rtol, floors=floor.tolist(), **more
    )
