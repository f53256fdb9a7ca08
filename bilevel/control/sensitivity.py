r"""How an optimum moves with the parameters of its problem: one more sweep, the factors kept.

The derivative of the conditions R of an optimum is

.. math::
    \begin{pmatrix} K & C^T \\ C & 0 \end{pmatrix}

with K that of the linear-quadratic problem of a Newton step and C the derivative of the active
constraints; its inverse is a sweep of that problem with other linear costs and with defects.
With constraints K is that of the augmented Lagrangian, K + rho C^T C, which has the same
solutions and is positive definite on the controls for some rho; the multipliers come from the
Schur complement C K^{-1} C^T, a matrix of the size of the active constraints (Nocedal & Wright
2006, Numerical Optimization, section 16.2).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.control.conditions import Multipliers
from bilevel.control.riccati.sweep import Gains, Model

DEPENDENT = 1e-10  # eigenvalue of the scaled Schur complement that counts as zero


class Vector(NamedTuple):
    """Vectors of the space of (Theta, w, U, p), one a column of the last axis.

    Attributes:
        own: ``(b, T, m, c)``.
        shared: ``(b, q, c)``.
        states: ``(b, T + 1, n, c)``.
        costates: ``(b, T + 1, n, c)``.
    """

    own: Tensor
    shared: Tensor
    states: Tensor
    costates: Tensor


def resweep(model: Model, gains: Gains, v: Vector) -> Vector:
    """K^{-1} v, for the numbers that no bound holds; zero for others.

    Args:
        model: whose matrices they are.
        gains: of its sweep.
        v: minus the linear costs, and minus the defects.

    Returns:
        The solution of the linear-quadratic problem with these.
    """
    nx, q = model.terminal.shape[1] - 1, model.start.shape[2]
    n, horizon = nx - q, model.steps.shape[1]
    A, B = model.maps[:, :, :nx, :nx], model.maps[:, :, :nx, nx + 1 :]
    P, K = gains.values[:, :, :nx, :nx], gains.gains[..., :nx]
    free = torch.ones_like(K[..., :1]) if gains.free is None else gains.free.unsqueeze(3)
    # States with what is shared beside, where neither has a cost or a defect of its own.
    costs, defects = (torch.nn.functional.pad(-x, (0, 0, 0, q)) for x in (v.states, v.costates))
    pushed = P @ defects
    s, values, changes = costs[:, horizon], [costs[:, horizon]], []
    for t in range(horizon - 1, -1, -1):
        ahead = s + pushed[:, t + 1]
        qc = (B[:, t].mT @ ahead - v.own[:, t]) * free[:, t]
        changes.append(-_solved(gains.factors[:, t], qc))
        s = costs[:, t] + A[:, t].mT @ ahead + K[:, t].mT @ qc
        values.append(s)
    values, changes = values[::-1], changes[::-1]
    slope = model.start.mT @ (s + pushed[:, 0]) - v.shared
    if gains.shared_free is not None:
        slope = slope * gains.shared_free.unsqueeze(2)
    shared = -_solved(gains.shared_factor, slope)
    x = defects[:, 0] + model.start @ shared
    states, own = [x], []
    for t in range(horizon):
        theta = changes[t] + K[:, t] @ x
        x = A[:, t] @ x + B[:, t] @ theta + defects[:, t + 1]
        states.append(x)
        own.append(theta)
    every = torch.stack(states, 1)
    costates = P @ every + torch.stack(values, 1)
    steps = torch.stack(own, 1) if own else torch.zeros_like(v.own)
    return Vector(steps, shared, every[:, :, :n], costates[:, :, :n])


def _solved(factor: Tensor, x: Tensor) -> Tensor:
    return torch.cholesky_solve(x, factor) if x.numel() else x


class Jacobian:
    """C: the derivatives of constraints, zero in the rows of those that are not active.

    Attributes:
        active: rows that count in each problem, ``(b, size)``; there are those of constraints that
            are active in any of them.
    """

    def __init__(self, steps: Tensor, end: Tensor, active: Multipliers) -> None:
        """Of constraints that are functions of the numbers that no bound holds.

        Args:
            steps: of inequalities and equalities in (u, w, theta), ``(b, T, k, n + q + m)``.
            end: of those of the end in (u(T), w), ``(b, k, n + q)``.
            active: which are.
        """
        here = torch.cat(active[:2], 2)
        there = torch.cat(active[2:], 1)
        self._at = here.flatten(1).any(0).nonzero().squeeze(1)
        self._last = there.any(0).nonzero().squeeze(1)
        self._steps, self._end = steps * here.unsqueeze(3), end * there.unsqueeze(2)
        self.active = torch.cat([here.flatten(1)[:, self._at], there[:, self._last]], 1)

    def times(self, y: Vector) -> Tensor:
        """C y, ``(b, size, c)``."""
        w = y.shared.unsqueeze(1).expand(-1, self._steps.shape[1], -1, -1)
        z = torch.cat([y.states[:, :-1], w, y.own], 2)
        end = torch.cat([y.states[:, -1], y.shared], 1)
        return self.rows(self._steps @ z, self._end @ end)

    def rows(self, steps: Tensor, end: Tensor) -> Tensor:
        """Those of all constraints, ``(b, T, k, c)`` and ``(b, k, c)``, that are rows of C."""
        return torch.cat([steps.flatten(1, 2)[:, self._at], end[:, self._last]], 1)

    def spread(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in the places of all constraints, zero elsewhere."""
        b, horizon, k = self._steps.shape[:3]
        steps = rows.new_zeros(b, horizon * k, rows.shape[2])
        steps[:, self._at] = rows[:, : len(self._at)]
        end = rows.new_zeros(b, self._end.shape[1], rows.shape[2])
        end[:, self._last] = rows[:, len(self._at) :]
        return steps.view(b, horizon, k, rows.shape[2]), end

    def transposed(self, rows: Tensor, like: Vector) -> Vector:
        """C^T of rows; `like` has the shapes of the result, but for its columns."""
        n, q = like.states.shape[2], like.shared.shape[1]
        steps, end = self.spread(rows)
        of_z, of_end = self._steps.mT @ steps, self._end.mT @ end
        return Vector(
            of_z[:, :, n + q :],
            of_z[:, :, n : n + q].sum(1) + of_end[:, n:],
            torch.cat([of_z[:, :, :n], of_end[:, None, :n]], 1),
            rows.new_zeros(*like.costates.shape[:3], rows.shape[2]),
        )

    def still(self) -> Tensor:
        """Rows of which no number of state or control is a part, ``(b, size)``."""
        sizes = self._steps.abs().amax(3, keepdim=True), self._end.abs().amax(2, keepdim=True)
        return self.rows(*sizes).squeeze(2) == 0

    def place(self, row: int) -> tuple[int, int]:
        """Step (from 1; 0 for the end) of a row, and its number there."""
        if row >= len(self._at):
            return 0, int(self._last[row - len(self._at)])
        step, i = divmod(int(self._at[row]), self._steps.shape[2])
        return step + 1, i


class Factors:
    """The inverse of the derivative of R at one optimum.

    Attributes:
        dependent: a row of active constraints that follows from the others or that no control
            moves, with its problem; None for none.
    """

    def __init__(
        self, model: Model, gains: Gains, jacobian: Jacobian | None, weight: float
    ) -> None:
        """Keep the factors.

        Args:
            model: K, of the augmented Lagrangian if there are constraints.
            gains: of its sweep.
            jacobian: C.
            weight: rho.
        """
        self._model, self._gains, self._jacobian, self._weight = model, gains, jacobian, weight
        self.dependent: tuple[int, int] | None = None
        if jacobian is not None:
            self._inverse = self._schur(jacobian)

    def _schur(self, jacobian: Jacobian) -> Tensor:
        """Inverse of C K^{-1} C^T, of the rows that depend on the controls each by itself."""
        b, size = jacobian.active.shape
        P = self._model.terminal
        identity = torch.eye(size, dtype=P.dtype, device=P.device)
        n, q = P.shape[1] - 1, self._model.start.shape[2]
        horizon, m = self._model.steps.shape[1], self._gains.gains.shape[2]
        like = Vector(
            P.new_empty(b, horizon, m, 0),
            P.new_empty(b, q, 0),
            P.new_empty(b, horizon + 1, n - q, 0),
            P.new_empty(b, horizon + 1, n - q, 0),
        )
        columns = jacobian.transposed(identity.expand(b, size, size), like)
        S = jacobian.times(resweep(self._model, self._gains, columns))
        S = (S + S.mT) / 2
        scale = S.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        least = 1e-12 * scale.amax(1, keepdim=True) if size else scale
        scale = torch.where(scale > least, 1 / scale, 0.0)
        values, vectors = torch.linalg.eigh(scale.unsqueeze(2) * S * scale.unsqueeze(1))
        counts = values > DEPENDENT
        still = jacobian.still() | ~jacobian.active
        # Every row that is no plain zero should have its direction.
        lacking = (counts.sum(1) < (~still).sum(1)).nonzero().flatten().tolist()
        if lacking:
            i = lacking[0]
            null = torch.where(counts[i], 0.0, vectors[i].abs()).sum(1) * ~still[i]
            self.dependent = i, int(null.argmax())
        inverse = torch.where(counts, 1 / torch.where(counts, values, 1.0), 0.0)
        found = (vectors * inverse.unsqueeze(1)) @ vectors.mT
        return scale.unsqueeze(2) * found * scale.unsqueeze(1)

    def solved(self, v: Vector, met: tuple[Tensor, Tensor]) -> tuple[Vector, tuple[Tensor, Tensor]]:
        """The inverse, times vectors; of numbers that are held it is one.

        Args:
            v: in the equations of (Theta, w, U, p).
            met: in those of the constraints of steps, ``(b, T, k, c)``, and of the end.

        Returns:
            The solution, and that of the multipliers.
        """
        model, gains, jacobian = self._model, self._gains, self._jacobian
        mu = met
        if jacobian is None or not jacobian.active.shape[1]:
            y = resweep(model, gains, v)
        else:
            d = jacobian.rows(*met) * jacobian.active.unsqueeze(2)
            added = jacobian.transposed(self._weight * d, v)
            pushed = Vector(*(a + b for a, b in zip(v, added, strict=True)))
            first = resweep(model, gains, pushed)
            rows = self._inverse @ (jacobian.times(first) - d)
            back = jacobian.transposed(rows, v)
            rest = Vector(*(a - b for a, b in zip(pushed, back, strict=True)))
            y = resweep(model, gains, rest)
            active = jacobian.spread(jacobian.active.unsqueeze(2).to(rows.dtype))
            found = jacobian.spread(rows)
            mu = (
                torch.where(active[0] > 0, found[0], met[0]),
                torch.where(active[1] > 0, found[1], met[1]),
            )
        own, shared = y.own, y.shared
        if gains.free is not None:
            own = torch.where(gains.free.unsqueeze(3), own, v.own)
        if gains.shared_free is not None:
            shared = torch.where(gains.shared_free.unsqueeze(2), shared, v.shared)
        return Vector(own, shared, y.states, y.costates), mu
