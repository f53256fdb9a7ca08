"""Rules that look for a root of a residual, as for a fixed point or the KKT conditions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.autodiff import Linearisation
from bilevel.checks import check_kind, check_whole
from bilevel.linear.flat import Flat
from bilevel.linear.gmres import GMRES
from bilevel.linear.operator import LinearSolver, Operator
from bilevel.optim.rules import InnerOptimizer, Ranges
from bilevel.settings import Setting, setting_at
from bilevel.tree import Tree

HALVINGS = 20  # of a Newton step, before it is taken as it is


@final
@dataclass(frozen=True)
class FixedPoint(InnerOptimizer):
    r"""The plain iteration :math:`w \leftarrow w - \eta R(w)`.

    With eta = 1 and R = w - Phi(w) that is :math:`w \leftarrow \Phi(w)`. It converges where Phi
    contracts; its steps can be reversed.

    Attributes:
        lr: eta > 0.

    Raises:
        ArgumentError: if it is not positive.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     residual=lambda w, a, batch: w - (w.cos() + a) / 2,  # w = (cos w + a) / 2
        ...     outer=lambda w, a, batch: w**2,
        ... )
        >>> method = bl.Implicit(bl.linear.GMRES())
        >>> solver = bl.BilevelSolver(problem, bl.optim.FixedPoint(), 60, method)
        >>> zero = torch.tensor(0.0, dtype=torch.float64)
        >>> round(solver.hypergradient(zero, zero).gradient.item(), 4)
        0.3697
    """

    symmetric: ClassVar[bool] = False
    of_roots: ClassVar[bool] = True
    lr: Setting = 1.0

    def update(self, state: Tree, gradient: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        return tree.moved(state, gradient, setting_at(self.lr, control, t))


class Past(NamedTuple):
    """State of `Anderson`: the last points and their residuals, flat, one a row."""

    params: Tree
    points: Tensor
    residuals: Tensor
    made: Tensor


@final
@dataclass(frozen=True)
class Anderson(InnerOptimizer):
    r"""Anderson acceleration of the plain iteration (Anderson 1965, doi:10.1145/321296.321305).

    Of the last points w_i that combination is taken, with weights of sum 1, whose residual is least
    (Walker & Ni 2011, doi:10.1137/10078356X), and one plain step is made from it. Its steps are not
    reversed: `Implicit` differentiates where they lead.

    Attributes:
        lr: eta > 0, of the plain step.
        memory: points that are combined, at least 1.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     residual=lambda w, a, batch: w - (w.cos() + a) / 2,  # w = (cos w + a) / 2
        ...     outer=lambda w, a, batch: w**2,
        ... )
        >>> method = bl.Implicit(bl.linear.GMRES())
        >>> solver = bl.BilevelSolver(problem, bl.optim.Anderson(), 60, method)
        >>> zero = torch.tensor(0.0, dtype=torch.float64)
        >>> round(solver.hypergradient(zero, zero).gradient.item(), 4)
        0.3697
    """

    symmetric: ClassVar[bool] = False
    reversible: ClassVar[bool] = False
    of_roots: ClassVar[bool] = True
    lr: Setting = 1.0
    memory: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self.memory, "memory", 1)

    def begin(self, params: Tree) -> Tree:  # noqa: D102
        flat = Flat(tree.zeros_like(params), "params")
        rows = flat.zeros().new_zeros(self.memory, flat.width)
        return Past(params, rows, rows, torch.zeros((), dtype=torch.int64, device="cpu"))

    def params(self, state: Tree) -> Tree:  # noqa: D102
        return state.params

    def update(self, state: Tree, gradient: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        flat = Flat(tree.zeros_like(state.params), "params")
        x, r = flat.vector(variables(state.params)), flat.vector(gradient)
        made, lr = int(state.made), setting_at(self.lr, control, t)
        points, residuals = state.points.clone(), state.residuals.clone()
        points[made % self.memory], residuals[made % self.memory] = x, r
        known = min(made + 1, self.memory)
        # Rows that are not filled yet, and that of this point, are zero and get the weight zero.
        X, D = (rows.clone() for rows in (points, residuals))
        X[:known] -= x
        D[:known] -= r
        gram = (D @ D.T).double()
        ridge = 16 * torch.finfo(D.dtype).eps * gram.diagonal().sum()
        eye = torch.eye(self.memory, dtype=gram.dtype, device=gram.device)
        weights = -torch.linalg.solve(gram + (ridge + (ridge == 0)) * eye, (D @ r).double())
        weights = weights.to(D)
        step = flat.copied((lr * (r + weights @ D) - weights @ X).contiguous())
        moved = tree.moved(state.params, step, 1.0)
        return Past(moved, points, residuals, state.made + 1)


def variables(params: Tree) -> Tree:
    """The params as a vector of their space."""
    return tree.map_leaves(lambda x: x if tree.is_variable(x) else None, params)


@final
@dataclass(frozen=True)
class NewtonKrylov(InnerOptimizer):
    r"""Newton's method, its linear systems solved by products (Knoll & Keyes 2004).

    Each step solves :math:`R_w p = R`, and is halved until the residual falls
    (doi:10.1016/j.jcp.2003.08.010). For objectives the residual is their gradient: it then finds a
    stationary point, and the certificate says whether that is a minimiser. Its steps are not
    reversed: `Implicit` differentiates where they lead.

    Attributes:
        linear: solver of the systems.
        lr: largest fraction of the step that is made.

    Raises:
        ArgumentError: if a setting is not what it should be.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     residual=lambda w, a, batch: w - (w.cos() + a) / 2,  # w = (cos w + a) / 2
        ...     outer=lambda w, a, batch: w**2,
        ... )
        >>> method = bl.Implicit(bl.linear.GMRES())
        >>> solver = bl.BilevelSolver(problem, bl.optim.NewtonKrylov(), 60, method)
        >>> zero = torch.tensor(0.0, dtype=torch.float64)
        >>> round(solver.hypergradient(zero, zero).gradient.item(), 4)
        0.3697
    """

    ranges: ClassVar[Ranges] = {"lr": {"above": 0, "most": 1}}
    reversible: ClassVar[bool] = False
    of_roots: ClassVar[bool] = True
    linear: LinearSolver = field(default_factory=lambda: GMRES(restart=100))
    lr: Setting = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind(self.linear, LinearSolver, "linear", "a linear solver such as GMRES()")

    def step(  # noqa: D102
        self,
        state: Tree,
        gradient: Callable[[Tree], Tree],
        control: Tree,
        batch: Any,  # noqa: ARG002
        t: int,
    ) -> Tree:
        there = Linearisation(gradient, state, name="the inner residual")
        size = tree.norm(there.value)
        if not size:
            return state
        found = self.linear.solve(Operator(there.push, there.pull), there.value)
        length: Any = setting_at(self.lr, control, t)
        with autodiff.paused():
            for _ in range(HALVINGS):
                moved = tree.moved(state, found.solution, length)
                if tree.norm(gradient(moved)) < size:  # what is not finite is not below it
                    return moved
                length = length / 2
        return state  # at rounding, or where the residual has a least value that is not zero

    def update(self, state: Tree, gradient: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        raise NotImplementedError("a Newton step needs the residual as a function: see `step`.")
