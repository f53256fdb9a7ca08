r"""The bilevel problem (3): an outer objective at the solution of an inner one.

.. math::
    \min_\alpha F(\theta(\alpha), \alpha) \quad \text{where} \quad
    \theta(\alpha) = \arg\min_\theta f(\theta, \alpha)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bilevel.checks import check_arguments, check_whole
from bilevel.errors import ArgumentError
from bilevel.tree import Tree

Objective = Callable[[Tree, Tree, Any], Tensor]  # (params, control, batch) -> real scalar
Start = Callable[[Tree, Tree], Tree]  # (params, control) -> params


@dataclass(frozen=True)
class BilevelProblem:
    """Two objectives, each a plain function `(params, control, batch) -> real scalar`.

    Attributes:
        inner: f, minimised over the params.
        outer: F, minimised over the control.
        start: where the inner iteration begins, `start(params, control) -> params`, for learned
            initialisations; None begins at the given params.
        columns: number M of independent problems whose params lie stacked on a leading axis of
            length M, f and F being sums over them; None for one problem. `weighted_problem` sets
            it for a matrix of weights. Linear systems are then solved column by column at once.

    Raises:
        ArgumentError: if a field is not what it should be.

    Example:
        >>> import torch
        >>> ridge = BilevelProblem(
        ...     inner=lambda w, alpha, batch: ((w - 1) ** 2).sum() + alpha.exp() * (w**2).sum(),
        ...     outer=lambda w, alpha, batch: ((w - 0.5) ** 2).sum(),
        ... )
        >>> ridge.inner(torch.ones(2), torch.tensor(0.0), None)
        tensor(2.)
    """

    inner: Objective
    outer: Objective
    start: Start | None = None
    columns: int | None = None

    def __post_init__(self) -> None:
        for name in ("inner", "outer", "start"):
            value = getattr(self, name)
            if not callable(value) and not (name == "start" and value is None):
                raise ArgumentError(
                    f"{name} must be a function of (params, control"
                    f"{'' if name == 'start' else ', batch'}), got {type(value).__name__}."
                )
            if value is not None:
                batch = () if name == "start" else ("batch",)
                check_arguments(value, name, "params", "control", *batch)
        check_whole(self.columns, "columns", 1, optional=True)
