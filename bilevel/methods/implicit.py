r"""Multipliers at the stationary point of the inner iteration.

With R(theta, alpha) = 0 at the inner solution (the gradient of f, or the fixed point equation of
proximal gradient) the implicit function theorem gives

.. math::
    \Big(\frac{\partial R}{\partial\theta}\Big)^* q = \nabla_\theta F, \qquad
    h = \nabla_\alpha F - \Big(\frac{\partial R}{\partial\alpha}\Big)^* q .

For gradient descent with step eta, q = -eta lambda, and lambda is the sum of the multipliers of the
sweep (7) frozen at the solution: a Neumann series, which conjugate gradients accelerate.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

from bilevel import tree
from bilevel.autodiff import Linearisation
from bilevel.checks import check_kind
from bilevel.dynamics.per_step import GradientSum
from bilevel.errors import LostGradientError
from bilevel.linear.cg import CG
from bilevel.linear.gmres import GMRES
from bilevel.linear.operator import LinearSolver, Operator
from bilevel.linear.singular import shortcoming
from bilevel.methods.base import Found, HypergradientMethod
from bilevel.methods.instance import Instance
from bilevel.tree import Tree


@final
@dataclass(frozen=True)
class Implicit(HypergradientMethod):
    """Exact for the exact inner minimiser; keeps no trajectory.

    Attributes:
        linear: solver of the linear system; `CG` for descent methods, `GMRES` or `NormalCG` for
            `ProximalGradient`, whose system is not symmetric. None is `CG(rtol=1e-8, probes=4)`,
            and for a problem by its residual `GMRES(restart=100)`.

    Raises:
        ArgumentError: if it is no linear solver.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2 + w**2,  # w(a) = a / 3
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(
        ...     problem, bl.optim.SGD(0.2), 60, bl.Implicit(bl.linear.CG())
        ... )
        >>> zero = torch.tensor(0.0)
        >>> hyper = solver.hypergradient(zero, zero)
        >>> round(hyper.gradient.item(), 4)
        -0.6667
    """

    steps: ClassVar[bool] = False
    linear: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_kind(self.linear, LinearSolver | None, "linear", "a linear solver such as CG()")

    def solver_for(self, instance: Instance) -> LinearSolver:
        """The linear solver, chosen where that was left open."""
        if self.linear is not None:
            return self.linear
        by_residual = instance.problem.residual is not None
        return GMRES(restart=100) if by_residual else CG(rtol=1e-8, probes=4)

    def find(self, instance: Instance) -> Found:  # noqa: D102
        reached = instance.iterated
        params = instance.dynamics.readout(reached.state)
        outer = instance.outer_gradient(params)
        residual, drawn = instance.draws_inside(lambda: instance.linearised(params))
        solved = self.solver_for(instance).solve(
            transposed(residual, instance),
            tree.filled(outer.in_params, params),
            instance.linear_start,
        )
        gradient = GradientSum(instance.control)
        gradient.add(instance.control, outer.in_control)
        gradient.subtract(instance.control, residual.pull(solved.solution, 1))
        total = self._total(gradient)
        warm = replace(reached, linear=solved.solution)
        flaw = ""
        if instance.problem.residual is not None:
            flaw = shortcoming(
                replace(transposed(residual, instance), adjoint=residual.push),
                tree.filled(outer.in_params, params),
                solved,
            )
        if drawn:
            flaw = (
                "the inner objective draws at random, and the linear system of Implicit is that of "
                "one draw, of which the params are no solution: draw outside and pass what was "
                "drawn as the batch, or take MLM(), which differentiates the steps with their draws"
            )
        if instance.by_batches:
            flaw = (
                "the linear system of Implicit is that of the last inner batch alone, not of the "
                "objective that the steps descended on: pass linear_batch=, all data or a large "
                "batch"
            )
        return Found(outer.value, total, warm, outer, solved, residual, flaw=flaw)

    def _total(self, gradient: GradientSum) -> Tree:
        try:
            return gradient.total()
        except LostGradientError as error:
            raise LostGradientError(
                f"{error} Implicit differentiates the limit of the inner iteration, which depends "
                "neither on step sizes nor on the start: learn those with MLM() or Unrolled()."
            ) from error


def transposed(residual: Linearisation, instance: Instance) -> Operator:
    """The adjoint of the derivative of the residual in the params."""
    symmetric = instance.symmetric
    return Operator(
        residual.pull,
        adjoint=None if symmetric else residual.push,
        symmetric=symmetric,
        columns=instance.problem.columns,
    )
