r"""The bilevel problem (3): an outer objective at the solution of an inner one.

.. math::
    \min_\alpha F(\theta(\alpha), \alpha) \quad \text{where} \quad
    \theta(\alpha) = \arg\min_\theta f(\theta, \alpha)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel.checks import check_arguments, check_kind, check_whole, takes
from bilevel.dynamics.closures import refuse_wrapped_in
from bilevel.errors import ArgumentError, UnsupportedError
from bilevel.tree import Tree

Objective = Callable[[Tree, Tree, Any], Tensor]  # (params, control, batch) -> real scalar
Start = Callable[[Tree, Tree], Tree]  # (params, control) -> params
Residual = Callable[[Tree, Tree, Any], Tree]  # (params, control, batch) -> a tree like the params


def missing(params: Tree, control: Tree, batch: Any) -> Tensor:  # noqa: ARG001
    """The objective of a problem that has none."""
    raise UnsupportedError(
        "a problem by its residual has no inner objective to evaluate: take Implicit(), which "
        "needs the residual alone."
    )


@dataclass(frozen=True)
class BilevelProblem:
    """Two objectives, each a plain function `(params, control, batch) -> real scalar`.

    In the place of the inner objective may stand a residual: the params then solve
    R(params, control, batch) = 0, a root, a fixed point or the KKT conditions of a constrained
    problem, and nobody claims that they minimise anything.

    Attributes:
        inner: f, minimised over the params.
        outer: F, minimised over the control.
        start: where the inner iteration begins, `start(params, control) -> params`, for learned
            initialisations; None begins at the given params.
        columns: number M of independent problems whose params lie stacked on a leading axis of
            length M, f and F being sums over them; None for one problem. `weighted_problem` sets
            it for a matrix of weights. Linear systems are then solved column by column at once.
        outer_each: r, what the outer objective is increased by at every inner step, a function
            `(params, control, batch)`, or with the number t = 1, ..., k of the step as a fourth
            argument, of the params before step t and of the outer batch; None for nothing. `MLM()`
            and `Unrolled()` see it.
        residual: R in the place of `inner`, a function `(params, control, batch) -> tree like the
            params`, differentiable, with as many equations as unknowns.

    Raises:
        ArgumentError: if a field is not what it should be.
        UnsupportedError: if a function uses a module that is wrapped to train over several
            processes.

    Example:
        >>> import torch
        >>> ridge = BilevelProblem(
        ...     inner=lambda w, alpha, batch: (
        ...         ((w - 1) ** 2).sum() + alpha.exp() * (w**2).sum()
        ...     ),
        ...     outer=lambda w, alpha, batch: ((w - 0.5) ** 2).sum(),
        ... )
        >>> ridge.inner(torch.ones(2), torch.tensor(0.0), None)
        tensor(2.)
        >>> root = BilevelProblem(
        ...     residual=lambda w, alpha, batch: w**3 + w - alpha,
        ...     outer=lambda w, alpha, batch: (w - 0.5) ** 2,
        ... )
    """

    inner: Objective = missing
    outer: Objective = missing
    start: Start | None = None
    columns: int | None = None
    outer_each: Callable[..., Tensor] | None = None
    residual: Residual | None = None
    _takes_step: bool = field(init=False, repr=False, default=False)

    def __post_init__(self) -> None:
        if (self.inner is missing) == (self.residual is None):
            came = "neither" if self.residual is None else "both"
            raise ArgumentError(
                f"a problem needs an inner objective, or residual= in its place, got {came}."
            )
        if self.outer is missing:
            raise ArgumentError(
                "a problem needs an outer objective: outer(params, control, batch)."
            )
        for name in ("inner", "outer", "start", "residual"):
            value = getattr(self, name)
            if not callable(value) and not (name in ("start", "residual") and value is None):
                raise ArgumentError(
                    f"{name} must be a function of (params, control"
                    f"{'' if name == 'start' else ', batch'}), got {type(value).__name__}."
                )
            if value is not None:
                batch = () if name == "start" else ("batch",)
                check_arguments(value, name, "params", "control", *batch)
        check_whole(self.columns, "columns", 1, optional=True)
        refuse_wrapped_in(self.inner, self.outer, self.start, self.outer_each, self.residual)
        if self.outer_each is not None:
            check_kind(
                self.outer_each, Callable, "outer_each", "a function (params, control, batch)"
            )
            takes_step = takes(self.outer_each, "params", "control", "batch", "t")
            object.__setattr__(self, "_takes_step", takes_step)
            if not takes_step:
                check_arguments(self.outer_each, "outer_each", "params", "control", "batch")

    def running(self, params: Tree, control: Tree, batch: Any, t: int) -> Any:
        """The value of `outer_each` at inner step t."""
        if self.outer_each is None:
            return torch.zeros(())
        step = (t,) if self._takes_step else ()
        return self.outer_each(params, control, batch, *step)

    @property
    def equation(self) -> Callable[..., Any]:
        """What defines the inner solution: the residual, or the objective."""
        return self.inner if self.residual is None else self.residual
