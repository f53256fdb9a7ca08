"""Rules around rules: clipped gradients, and a rule of its own for each part of the params."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, final

import optree
import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_kind, check_range
from bilevel.errors import ArgumentError, StructureError, UnsupportedError
from bilevel.optim.rules import InnerOptimizer, Ranges
from bilevel.tree import Tree

TORCH_EPS = 1e-6  # what `torch.nn.utils.clip_grad_norm_` adds to the norm
RULE = "a rule such as bilevel.optim.SGD(0.1)"


def _refuse_whole(rule: InnerOptimizer) -> None:
    """Refuse a rule that makes its steps by itself, not by the gradient it is given."""
    if not rule.reversible:
        raise ArgumentError(
            f"{type(rule).__name__} makes its steps by itself, so that nothing goes around it: use "
            "it as it is, or take a rule such as bilevel.optim.SGD(0.1)."
        )


@final
@dataclass(frozen=True)
class Clipped(InnerOptimizer):
    """A rule that gets clipped gradients, as by `torch.nn.utils.clip_grad_norm_` before each step.

    The clipping is differentiated with the step. A decay of the rule is added after it, as in
    torch. The solution is that of the rule, which nothing is clipped at.

    Attributes:
        rule: the one that makes the steps.
        max_norm: scale the gradient so that its norm over all leaves is at most this.
        clip_value: move each entry, real and imaginary parts each, into this range around zero.

    Raises:
        ArgumentError: if not exactly one of the two is given, or it is not positive.

    Example:
        >>> from bilevel.optim import SGD
        >>> rule = Clipped(SGD(0.1), max_norm=1.0)
        >>> rule.update(torch.zeros(2), torch.tensor([3.0, 4.0]), None, 1)
        tensor([-0.0600, -0.0800])
    """

    ranges: ClassVar[Ranges] = {}
    rule: InnerOptimizer
    max_norm: float | None = None
    clip_value: float | None = None

    def __post_init__(self) -> None:
        check_kind(self.rule, InnerOptimizer, "rule", RULE)
        _refuse_whole(self.rule)
        if (self.max_norm is None) == (self.clip_value is None):
            raise ArgumentError(
                "Clipped needs either max_norm or clip_value, got "
                f"{'neither' if self.max_norm is None else 'both: put one Clipped around another'}."
            )
        given = "max_norm" if self.clip_value is None else "clip_value"
        check_range(getattr(self, given), given, above=0)
        object.__setattr__(self, "symmetric", self.rule.symmetric)

    def _clipped(self, gradient: Tree) -> Tree:
        if self.max_norm is None:
            return tree.map_leaves(self._inside, gradient)
        square = tree.inner(gradient, gradient)
        positive = square > 0  # the root has no derivative at 0
        length = torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)
        factor = (self.max_norm / (length + TORCH_EPS)).clamp(max=1.0)
        return tree.map_leaves(lambda g: None if g is None else g * factor, gradient)

    def _inside(self, g: Any) -> Any:
        if g is None:
            return None
        c = self.clip_value or 0.0
        if not g.is_complex():
            return g.clamp(-c, c)
        return torch.complex(g.real.clamp(-c, c), g.imag.clamp(-c, c))

    def begin(self, params: Tree) -> Tree:  # noqa: D102
        return self.rule.begin(params)

    def params(self, state: Tree) -> Tree:  # noqa: D102
        return self.rule.params(state)

    def point(self, state: Tree) -> Tree:  # noqa: D102
        return self.rule.point(state)

    def placed(self, state: Tree, params: Tree) -> Tree:  # noqa: D102
        return self.rule.placed(state, params)

    def update(self, state: Tree, gradient: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        return self.rule.update(state, self._clipped(gradient), control, t)

    @property
    def separable(self) -> bool:  # noqa: D102
        return self.max_norm is None and self.rule.separable

    @property
    def searches(self) -> bool:  # noqa: D102
        return self.rule.searches

    def searched(  # noqa: D102
        self, state: Tree, gradient: Tree, control: Tree, t: int, value: Callable[[Tree], Tensor]
    ) -> Tree:
        return self.rule.searched(state, self._clipped(gradient), control, t, value)

    def check(self, params: Tree, control: Tree, t: int) -> None:  # noqa: D102
        self.rule.check(params, control, t)

    def residual(self, params: Tree, gradient: Tree, control: Tree, t: int) -> Tree:
        """That of the rule: nothing is clipped at the solution."""
        return self.rule.residual(params, gradient, control, t)

    def term(self, params: Tree, control: Tree, t: int) -> Tensor | float:  # noqa: D102
        return self.rule.term(params, control, t)

    def on_kink(self, params: Tree, gradient: Tree, control: Tree, t: int) -> bool:  # noqa: D102
        return self.rule.on_kink(params, gradient, control, t)

    @property
    def residual_is_gradient(self) -> bool:  # noqa: D102
        return self.rule.residual_is_gradient

    def scaled(self, factor: float) -> Self:  # noqa: D102
        return replace(self, rule=self.rule.scaled(factor))


@final
@dataclass(frozen=True, eq=False)
class ByLeaf(InnerOptimizer):
    """A rule for each part of the params, as parameter groups in `torch.optim`.

    Attributes:
        rules: a tree like the params, or like the top of it, of rules.

    Raises:
        ArgumentError: if a part is no rule.
        UnsupportedError: if one searches along a line: the value is that of all parts.

    Example:
        >>> from bilevel.optim import SGD
        >>> rule = ByLeaf({"w": SGD(0.5), "b": SGD(0.1)})
        >>> params = {"w": torch.ones(2), "b": torch.tensor(0.0)}
        >>> state = rule.update(rule.begin(params), params, None, 1)
        >>> rule.params(state)["w"]
        tensor([0.5000, 0.5000])
    """

    ranges: ClassVar[Ranges] = {}
    rules: Tree

    def __post_init__(self) -> None:
        for rule in self._all:
            check_kind(rule, InnerOptimizer, "a part of rules", RULE)
            _refuse_whole(rule)
            if rule.searches:
                raise UnsupportedError(
                    "a line search needs the value of all params, and ByLeaf hands a part to each "
                    "rule: leave line_search out, or use one rule for all."
                )
        object.__setattr__(self, "symmetric", all(rule.symmetric for rule in self._all))

    @property
    def _all(self) -> list[InnerOptimizer]:
        return tree.leaves_of(self.rules)

    def _parts(self, values: Tree) -> list[Tree]:
        structure = tree.flatten(self.rules)[1]
        try:
            return structure.flatten_up_to(values)
        except ValueError as error:
            raise StructureError(
                "ByLeaf must have the structure of the params, or of the top of it, "
                f"{tree.flatten(values)[1]}, got {structure}."
            ) from error

    def _joined(self, parts: list[Tree]) -> Tree:
        return optree.tree_unflatten(tree.flatten(self.rules)[1], parts)

    def begin(self, params: Tree) -> Tree:  # noqa: D102
        parts = self._parts(params)
        return tuple(rule.begin(p) for rule, p in zip(self._all, parts, strict=True))

    def params(self, state: Tree) -> Tree:  # noqa: D102
        pairs = zip(self._all, state, strict=True)
        return self._joined([rule.params(s) for rule, s in pairs])

    def point(self, state: Tree) -> Tree:  # noqa: D102
        pairs = zip(self._all, state, strict=True)
        return self._joined([rule.point(s) for rule, s in pairs])

    def placed(self, state: Tree, params: Tree) -> Tree:  # noqa: D102
        each = zip(self._all, state, self._parts(params), strict=True)
        return tuple(rule.placed(s, p) for rule, s, p in each)

    def update(self, state: Tree, gradient: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        each = zip(self._all, state, self._parts(gradient), strict=True)
        return tuple(rule.update(s, g, control, t) for rule, s, g in each)

    def check(self, params: Tree, control: Tree, t: int) -> None:  # noqa: D102
        for rule, p in zip(self._all, self._parts(params), strict=True):
            rule.check(p, control, t)

    def residual(self, params: Tree, gradient: Tree, control: Tree, t: int) -> Tree:
        """That of each rule, for its part."""
        each = zip(self._all, self._parts(params), self._parts(gradient), strict=True)
        return self._joined([rule.residual(p, g, control, t) for rule, p, g in each])

    def term(self, params: Tree, control: Tree, t: int) -> Tensor | float:
        """The sum of what the rules add to the objective."""
        pairs = zip(self._all, self._parts(params), strict=True)
        return sum((rule.term(p, control, t) for rule, p in pairs), 0.0)

    def on_kink(self, params: Tree, gradient: Tree, control: Tree, t: int) -> bool:  # noqa: D102
        each = zip(self._all, self._parts(params), self._parts(gradient), strict=True)
        return any(rule.on_kink(p, g, control, t) for rule, p, g in each)

    @property
    def separable(self) -> bool:  # noqa: D102
        return all(rule.separable for rule in self._all)

    @property
    def residual_is_gradient(self) -> bool:  # noqa: D102
        return all(rule.residual_is_gradient for rule in self._all)

    def scaled(self, factor: float) -> Self:  # noqa: D102
        return replace(self, rules=self._joined([rule.scaled(factor) for rule in self._all]))
