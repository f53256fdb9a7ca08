"""Gradient descent with a proximal operator: plain, accelerated, with a line search."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.checks import check_kind
from bilevel.errors import DivergenceError
from bilevel.optim.rules import InnerOptimizer
from bilevel.prox.operators import Prox
from bilevel.settings import Setting, setting_at
from bilevel.tree import Tree

MOST_HALVINGS = 40  # in one step; beyond, rounding hides that f does not fall


class Extrapolated(NamedTuple):
    """State of `ProximalGradient`, accelerated or with a line search.

    Attributes:
        params: x.
        point: y, where the next gradient is taken.
        age: t, which grows from 1 with the steps since the last restart.
        scale: of the learning rate, a power of 1/2.
    """

    params: Tree
    point: Tree
    age: Tensor
    scale: Tensor


@final
@dataclass(frozen=True)
class ProximalGradient(InnerOptimizer):
    r"""Forward-backward steps.

    .. math:: \theta^{(t)} = \mathrm{prox}_{\eta p}(y - \eta \nabla_\theta f(y)),
        \qquad y = \theta^{(t-1)} \;\text{or}\; \theta^{(t-1)}
        + \beta_t (\theta^{(t-1)} - \theta^{(t-2)})

    The minimised function is f + p: the inner objective f is smooth, the penalty p may not be.
    `Implicit` then solves with the derivative of the fixed point equation, which is not symmetric:
    it needs GMRES or NormalCG.

    Attributes:
        lr: eta > 0; with a line search the largest.
        prox: of p, from `bilevel.prox`; its weights may be functions of the control.
        accelerated: FISTA (Beck & Teboulle 2009), begun again where the momentum points uphill
            (O'Donoghue & Candes 2015). f is then evaluated at points y that need not be in the
            domain of p.
        line_search: halve eta for good where f is above its quadratic model (Beck & Teboulle
            2009). The step is differentiated at the eta that was found, which is as constant as
            the number of halvings.

    Raises:
        ArgumentError: if a setting is not what it should be.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - 2) ** 2 / 2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2 / 2,
        ... )
        >>> rule = bl.optim.ProximalGradient(0.5, bl.prox.L1(lambda a: a))  # w(a) = 2 - a
        >>> solver = bl.BilevelSolver(problem, rule, inner_steps=60)
        >>> round(
        ...     solver.hypergradient(torch.tensor(0.0), torch.tensor(0.5)).gradient.item(),
        ...     4,
        ... )
        -0.5
    """

    symmetric: ClassVar[bool] = False
    lr: Setting
    prox: Prox
    accelerated: bool = False
    line_search: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind(self.prox, Prox, "prox", "an operator such as L1(...), Box(...) or Simplex()")
        for name in ("accelerated", "line_search"):
            check_kind(getattr(self, name), bool, name, "True or False")

    @property
    def _plain(self) -> bool:
        return not (self.accelerated or self.line_search)

    @property
    def separable(self) -> bool:  # noqa: D102
        return self._plain and self.prox.separable

    @property
    def searches(self) -> bool:  # noqa: D102
        return self.line_search

    def begin(self, params: Tree) -> Tree:  # noqa: D102
        if self._plain:
            return params
        first = next(x for x in tree.leaves_of(params) if tree.is_variable(x))
        one = torch.ones((), dtype=first.real.dtype, device=first.device)
        return Extrapolated(params, tree.copied(params), one, one.clone())

    def params(self, state: Tree) -> Tree:  # noqa: D102
        return state if self._plain else state.params

    def point(self, state: Tree) -> Tree:  # noqa: D102
        return state if self._plain else state.point

    def placed(self, state: Tree, params: Tree) -> Tree:  # noqa: D102
        if self._plain:
            return params
        point = tree.moved(state.point, tree.subtract(state.params, params), 1.0)
        return state._replace(params=params, point=point)

    def update(self, state: Tree, gradient: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        lr: Any = setting_at(self.lr, control, t)
        if self._plain:
            return self._step(state, gradient, lr, control)
        following = self._step(state.point, gradient, _scaled(lr, state.scale), control)
        if not self.accelerated:
            return state._replace(params=following, point=following)
        way = tree.subtract(following, state.params)
        uphill = tree.inner(tree.subtract(state.point, following), way) > 0
        older = (1 + (1 + 4 * state.age.detach() ** 2).sqrt()) / 2
        momentum = torch.where(uphill, 0, (state.age.detach() - 1) / older)
        point = tree.map_leaves(lambda x, d: x if d is None else x + momentum * d, following, way)
        age = torch.where(uphill, torch.ones_like(older), older)
        return Extrapolated(following, point, age, state.scale)

    def _step(self, point: Tree, gradient: Tree, lr: Any, control: Tree) -> Tree:
        return self.prox(tree.moved(point, gradient, lr), lr, control)

    def searched(  # noqa: D102
        self,
        state: Tree,
        gradient: Tree,
        control: Tree,
        t: int,
        value: Callable[[Tree], Tensor],
    ) -> Tree:
        point, gradient, control = tree.detach((state.point, gradient, control))
        with autodiff.paused():
            lr: Any = setting_at(self.lr, control, t)
            scale, here = state.scale.detach(), float(value(point))
            rounding = 16 * torch.finfo(scale.dtype).eps * abs(here)
            for _ in range(MOST_HALVINGS):
                size = _scaled(lr, scale)
                there = self._step(point, gradient, size, control)
                way = tree.subtract(there, point)
                model = here + float(tree.inner(gradient, way)) + _square(way, size) / 2
                if float(value(there)) <= model + rounding:
                    return state._replace(scale=scale)
                scale = scale / 2
        raise DivergenceError(
            f"the line search found no step down in {MOST_HALVINGS} halvings of lr: the inner "
            "objective is not finite there, or its gradient is not that of its value."
        )

    def check(self, params: Tree, control: Tree, t: int) -> None:  # noqa: D102
        super().check(params, control, t)
        self.prox.check(params, control)

    def on_kink(self, params: Tree, gradient: Tree, control: Tree, t: int) -> bool:  # noqa: D102
        lr: Any = setting_at(self.lr, control, t)
        # On which side of a kink the solution lies is known no better than the residual is small.
        slack = self.residual(params, gradient, control, t)
        return self.prox.on_kink(tree.moved(params, gradient, lr), lr, control, slack)

    def residual(self, params: Tree, gradient: Tree, control: Tree, t: int) -> Tree:
        """The params minus what one plain step makes of them."""
        lr: Any = setting_at(self.lr, control, t)
        return tree.subtract(params, self._step(params, gradient, lr, control))

    def term(self, params: Tree, control: Tree, t: int) -> Tensor | float:  # noqa: ARG002
        """The penalty p."""
        return self.prox.term(params, control)


def _scaled(lr: Any, scale: Tensor) -> Any:
    if isinstance(lr, float | int | Tensor):
        return lr * scale
    return tree.map_leaves(lambda x: None if x is None else x * scale, lr)


def _square(way: Tree, size: Any) -> float:
    """The squared length, divided by the step size of each leaf."""
    sizes = size if not isinstance(size, Tensor) else tree.map_leaves(lambda _: size, way)
    pairs = zip(tree.leaves_of(way), tree.leaves_of(sizes), strict=True)
    return sum(float(((d * d.conj()).real / s).sum()) for d, s in pairs if d is not None)
