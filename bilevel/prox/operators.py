r"""Proximal operators: the part of an inner objective that need not be smooth.

.. math::
    \mathrm{prox}_{\eta p}(z) = \arg\min_x \tfrac12 |x - z|^2 + \eta\, p(x)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import refuse_setting
from bilevel.errors import ArgumentError, StructureError, UnsupportedError
from bilevel.settings import Setting, check_setting, for_each
from bilevel.tree import Tree


class Prox(ABC):
    """A penalty p and its proximal operator.

    Example:
        A set of one's own, here whole numbers' nearest half line:

        >>> import dataclasses, torch, bilevel as bl
        >>> @dataclasses.dataclass(frozen=True)
        ... class AtLeast(Prox):
        ...     bound: float
        ...
        ...     def __call__(self, params, step_size, control):
        ...         return params.clamp_min(self.bound)
        ...
        ...     def value(self, params, control):
        ...         return torch.where((params >= self.bound).all(), 0.0, torch.inf)
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: ((w - a) ** 2).sum() / 2,
        ...     outer=lambda w, a, batch: (w**2).sum(),
        ... )
        >>> rule = bl.optim.ProximalGradient(0.5, AtLeast(1.0))
        >>> solver = bl.BilevelSolver(problem, rule, inner_steps=60)
        >>> found = solver.hypergradient(torch.zeros(2), torch.tensor([-3.0, 2.0]))
        >>> found.gradient + 0  # the first stays at its bound
        tensor([0., 4.])
    """

    @abstractmethod
    def __call__(self, params: Tree, step_size: Any, control: Tree) -> Tree:
        """The proximal operator, differentiable in all arguments.

        Args:
            params: z; leaves that are no variables are passed through.
            step_size: eta, a number, a scalar tensor, or a tree like the params.
            control: what a learned weight is read from.

        Returns:
            The minimiser, like the params.
        """

    @abstractmethod
    def value(self, params: Tree, control: Tree) -> Tensor:
        """p(params), a real scalar; the full inner objective is that of the problem plus this."""

    def term(self, params: Tree, control: Tree) -> Tensor | float:
        """p(params) as a function whose gradient in the control counts; of a set, nothing.

        Args:
            params: in the set, if p is the indicator of one.
            control: what a learned weight is read from.

        Returns:
            `value`; 0 for a set that does not move with the control.

        Raises:
            UnsupportedError: if it does: that part of the gradient is not in p.
        """
        return self.value(params, control)

    def on_kink(
        self,
        params: Tree,  # noqa: ARG002
        step_size: Any,  # noqa: ARG002
        control: Tree,  # noqa: ARG002
        slack: Tree,  # noqa: ARG002
    ) -> bool:
        """Whether the operator has no derivative at some component; by default never.

        Args:
            params: z.
            step_size: eta.
            control: what a learned weight is read from.
            slack: how well each component of z is known, beside rounding.

        Returns:
            Whether it stands between two branches.
        """
        return False

    @property
    def separable(self) -> bool:
        """Whether what lies along the first axis of leaves is moved each on its own."""
        return False

    def check(self, params: Tree, control: Tree) -> None:  # noqa: B027
        """Refuse settings that a function of the control left out of range; by default none.

        Args:
            params: what the operator is applied to.
            control: what the settings are read from, detached.

        Raises:
            ArgumentError: if a setting is out of range.
            StructureError: if a setting is no tree like the params.
        """


def like(setting: Any, params: Tree, control: Tree, name: str) -> Tree:
    """A setting for each leaf of the params."""
    return for_each(setting(control) if callable(setting) else setting, params, name)


def times(weight: Tree, step_size: Any, params: Tree) -> Tree:
    """The weights times the step size, leaf by leaf."""
    sizes = for_each(step_size, params, "step_size")
    return tree.map_leaves(lambda w, s: None if w is None else w * s, weight, sizes)


def check_weights(weight: Any, params: Tree, control: Tree) -> None:
    """Refuse weights that are negative where they are used."""
    check_setting(like(weight, params, control, "weight"), "weight", least=0)


@final
@dataclass(frozen=True)
class L1(Prox):
    r""":math:`p(x) = w \sum_i |x_i|`: soft thresholding, of the magnitude where x is complex.

    Attributes:
        weight: w >= 0; a number, a tensor, or a function of the control.

    Raises:
        ArgumentError: if it is negative.

    Example:
        >>> L1(2.0)(torch.tensor([3.0, -0.5, -2.0]), 0.5, None)
        tensor([ 2.,  0., -1.])
    """

    weight: Setting

    def __post_init__(self) -> None:
        check_setting(self.weight, "weight", least=0)

    @property
    def separable(self) -> bool:  # noqa: D102
        return True

    def __call__(self, params: Tree, step_size: Any, control: Tree) -> Tree:  # noqa: D102
        thresholds = times(like(self.weight, params, control, "weight"), step_size, params)
        return tree.map_leaves(_shrink, params, thresholds)

    def value(self, params: Tree, control: Tree) -> Tensor:  # noqa: D102
        weight = like(self.weight, params, control, "weight")
        return summed(lambda x, w: (w * _magnitude(x)[0]).sum(), params, weight)

    def on_kink(  # noqa: D102
        self, params: Tree, step_size: Any, control: Tree, slack: Tree
    ) -> bool:
        thresholds = times(like(self.weight, params, control, "weight"), step_size, params)
        # A threshold of zero leaves the operator the identity, which is smooth.
        return any_tie(
            lambda x, t, s: (
                tied(_magnitude(x)[0], t, s) & (torch.as_tensor(t, device=x.device) > 0)
            ),
            params,
            thresholds,
            slack,
        )

    def check(self, params: Tree, control: Tree) -> None:  # noqa: D102
        check_weights(self.weight, params, control)


def tied(x: Tensor, bound: Any, slack: Tensor) -> Tensor:
    """Where `x` is at a bound, to rounding or to the slack."""
    bound = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
    rounding = 8 * torch.finfo(x.dtype).eps * torch.maximum(x.abs(), bound.abs())
    return (x - bound).abs() <= torch.maximum(rounding, slack.abs())


def any_tie(
    tie: Callable[[Tensor, Any, Tensor], Tensor], params: Tree, bounds: Tree, slack: Tree
) -> bool:
    """Whether some component is at its bound."""
    each = zip(*map(tree.leaves_of, (params, bounds, slack)), strict=True)
    return any(bool(tie(x, b, s).any()) for x, b, s in each if b is not None)


def _magnitude(x: Tensor) -> tuple[Tensor, Tensor]:
    """|x| with the derivative zero at 0, and where it is not 0."""
    if not x.is_complex():
        return x.abs(), x != 0
    square = x.real**2 + x.imag**2
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0), positive


def _shrink(x: Any, threshold: Any) -> Any:
    if threshold is None:
        return x
    # At the threshold itself the derivative is that from outside: a weight of 0 changes nothing.
    if not x.is_complex():
        return torch.where(x.abs() >= threshold, x - threshold * torch.sign(x), 0)
    size, positive = _magnitude(x)
    factor = 1 - threshold / torch.where(positive, size, 1)
    return x * torch.where(size >= threshold, factor, 0)


def summed(term: Callable[[Tensor, Any], Tensor], params: Tree, weight: Tree) -> Tensor:
    """The sum over the leaves."""
    pairs = zip(tree.leaves_of(params), tree.leaves_of(weight), strict=True)
    terms = [term(x, w) for x, w in pairs if w is not None]
    return sum(terms[1:], terms[0]) if terms else torch.zeros((), device="cpu")


@final
@dataclass(frozen=True)
class L2(Prox):
    r""":math:`p(x) = \tfrac{w}{2} \sum_i |x_i|^2`: division by :math:`1 + \eta w`.

    Attributes:
        weight: w >= 0; a number, a tensor, or a function of the control.

    Raises:
        ArgumentError: if it is negative.

    Example:
        >>> L2(2.0)(torch.tensor([3.0, -1.0]), 0.5, None)
        tensor([ 1.5000, -0.5000])
    """

    weight: Setting

    def __post_init__(self) -> None:
        check_setting(self.weight, "weight", least=0)

    @property
    def separable(self) -> bool:  # noqa: D102
        return True

    def __call__(self, params: Tree, step_size: Any, control: Tree) -> Tree:  # noqa: D102
        scale = times(like(self.weight, params, control, "weight"), step_size, params)
        return tree.map_leaves(lambda x, s: x if s is None else x / (1 + s), params, scale)

    def value(self, params: Tree, control: Tree) -> Tensor:  # noqa: D102
        weight = like(self.weight, params, control, "weight")
        return summed(lambda x, w: (w * (x * x.conj()).real).sum() / 2, params, weight)

    def check(self, params: Tree, control: Tree) -> None:  # noqa: D102
        check_weights(self.weight, params, control)


@final
@dataclass(frozen=True)
class Box(Prox):
    """The indicator of lower <= x <= upper: clamping. Real params only.

    Attributes:
        lower: a number, a tensor, or a function of the control; None for no bound.
        upper: a bound of the same kinds, above `lower`.

    Raises:
        ArgumentError: if there is no bound, or the bounds exclude everything.

    Example:
        >>> Box(0.0, 1.0)(torch.tensor([-0.5, 0.3, 2.0]), 0.1, None)
        tensor([0.0000, 0.3000, 1.0000])
    """

    lower: Setting | None = None
    upper: Setting | None = None

    def __post_init__(self) -> None:
        if self.lower is None and self.upper is None:
            raise ArgumentError("Box needs a lower or an upper bound, got neither.")
        for name in ("lower", "upper"):
            if getattr(self, name) is not None:
                check_setting(getattr(self, name), name)
        if not (callable(self.lower) or callable(self.upper)):
            _check_order(self.lower, self.upper)

    @property
    def separable(self) -> bool:  # noqa: D102
        return True

    def __call__(self, params: Tree, step_size: Any, control: Tree) -> Tree:  # noqa: ARG002
        """See `Prox`."""
        for name, above in (("lower", False), ("upper", True)):
            bound = getattr(self, name)
            if bound is not None:
                each = like(bound, params, control, name)
                params = tree.map_leaves(
                    lambda x, b, above=above: _bounded(x, b, above=above), params, each
                )
        return params

    def on_kink(  # noqa: D102
        self,
        params: Tree,
        step_size: Any,  # noqa: ARG002
        control: Tree,
        slack: Tree,
    ) -> bool:
        bounds = [(getattr(self, name), name) for name in ("lower", "upper")]
        return any(
            any_tie(tied, params, like(bound, params, control, name), slack)
            for bound, name in bounds
            if bound is not None
        )

    def value(self, params: Tree, control: Tree) -> Tensor:
        """See `Prox`; 0 inside, infinite outside."""
        pairs = zip(tree.leaves_of(params), tree.leaves_of(self(params, 1.0, control)), strict=True)
        moved = [(x != y).any() for x, y in pairs if tree.is_variable(x)]
        return (
            torch.where(torch.stack(moved).any(), math.inf, 0.0)
            if moved
            else torch.zeros((), device="cpu")
        )

    def term(self, params: Tree, control: Tree) -> Tensor | float:  # noqa: ARG002, D102
        return nothing_of_a_set(self, self.lower, self.upper)

    def check(self, params: Tree, control: Tree) -> None:  # noqa: D102
        bounds = [
            tree.leaves_of(like(bound, params, control, name))
            for name in ("lower", "upper")
            if (bound := getattr(self, name)) is not None
        ]
        for leaves in bounds:
            refuse_setting(leaves, "a bound")
        if len(bounds) == 2:
            for a, b in zip(*bounds, strict=True):
                _check_order(a, b)


def nothing_of_a_set(prox: Prox, *settings: Any) -> float:
    """What a set adds to an objective, where it is defined by these settings."""
    if any(callable(setting) for setting in settings):
        raise UnsupportedError(
            f"the set of {type(prox).__name__} moves with the control, and its indicator has no "
            "gradient to tell: take Implicit(GMRES()), MLM() or Unrolled(), which differentiate "
            "the projection."
        )
    return 0.0


def _check_order(lower: Any, upper: Any) -> None:
    if lower is None or upper is None:
        return
    if not bool(torch.as_tensor(lower <= upper, device="cpu").all()):
        raise ArgumentError(f"lower must be <= upper, got {lower} and {upper}.")


def _bounded(x: Any, bound: Any, *, above: bool) -> Any:
    if bound is None:
        return x
    if x.is_complex():
        raise StructureError(
            f"Box bounds real params, got a {x.dtype} leaf: complex numbers have no order; bound "
            "real and imaginary parts as two leaves."
        )
    bound = torch.as_tensor(bound, dtype=x.dtype, device=x.device).expand_as(x)
    # At the bound itself the derivative is that from inside: `maximum` would take half of each.
    return torch.where(x > bound if above else x < bound, bound, x)
