r"""The bilevel problem (3): an outer objective at the solution of an inner one.

.. math::
    \min_\alpha F(\theta(\alpha), \alpha) \quad \text{where} \quad
    \theta(\alpha) = \arg\min_\theta f(\theta, \alpha)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bilevel.checks import is_whole
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
        """Check the fields."""
        for name in ("inner", "outer", "start"):
            value = getattr(self, name)
            if not callable(value) and not (name == "start" and value is None):
                raise ArgumentError(
                    f"{name} must be a function of (params, control"
                    f"{'' if name == 'start' else ', batch'}), got {type(value).__name__}."
                )
        if self.columns is not None and not is_whole(self.columns, 1):
            raise ArgumentError(f"columns must be an integer >= 1, or None, got {self.columns!r}.")


@dataclass(frozen=True)
class ByStep:
    """A setting that changes with the inner step: a batch, a step size.

    Attributes:
        value: what step t = 1, 2, ... uses; a deterministic function of t, since sweeps ask again.
            With a warm start t goes on counting where the last solve ended.

    Raises:
        ArgumentError: if it is not a function.

    Example:
        >>> batches = ["a", "b", "c"]
        >>> at_step(ByStep(lambda t: batches[t % 3]), 4)
        'b'
    """

    value: Callable[[int], Any]

    def __post_init__(self) -> None:
        """Check the field."""
        if not callable(self.value):
            raise ArgumentError(
                f"ByStep takes a function of the step t = 1, 2, ..., got "
                f"{type(self.value).__name__}; a constant is given as it is."
            )


def at_step(setting: Any, t: int) -> Any:
    """What `setting` is at inner step `t`: itself, unless it is a `ByStep`."""
    return setting.value(t) if isinstance(setting, ByStep) else setting
