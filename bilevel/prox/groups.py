"""Penalties of groups of entries, and one operator for each part of a tree."""

from dataclasses import dataclass
from typing import Any, final

import optree
import torch
from torch import Tensor

from bilevel import tree
from bilevel.errors import ArgumentError, StructureError
from bilevel.prox.operators import L1, L2, Prox, check_weights, like, summed, tied, times
from bilevel.prox.sets import Axes, axes_of, check_axes, from_the_end, length_of, one_step
from bilevel.settings import Setting, check_setting
from bilevel.tree import Tree


@final
@dataclass(frozen=True)
class ElasticNet(Prox):
    r""":math:`p(x) = w_1 \sum_i |x_i| + \tfrac{w_2}{2} \sum_i |x_i|^2` (Zou & Hastie 2005).

    Soft thresholding, then division by :math:`1 + \eta w_2`; a tie as in `L1`.

    Attributes:
        l1: w_1 >= 0; a number, a tensor, or a function of the control.
        l2: w_2 >= 0, of the same kinds.

    Raises:
        ArgumentError: if one is negative.

    Example:
        >>> ElasticNet(2.0, 2.0)(torch.tensor([3.0, -0.5, -2.0]), 0.5, None)
        tensor([ 1.0000,  0.0000, -0.5000])
    """

    l1: Setting
    l2: Setting

    def __post_init__(self) -> None:
        for name in ("l1", "l2"):
            check_setting(getattr(self, name), name, least=0)

    @property
    def separable(self) -> bool:  # noqa: D102
        return True

    def __call__(self, params: Tree, step_size: Any, control: Tree) -> Tree:  # noqa: D102
        sparse = L1(self.l1)(params, step_size, control)
        return L2(self.l2)(sparse, step_size, control)

    def value(self, params: Tree, control: Tree) -> Tensor:  # noqa: D102
        return L1(self.l1).value(params, control) + L2(self.l2).value(params, control)

    def on_kink(self, params: Tree, step_size: Any, control: Tree, slack: Tree) -> bool:  # noqa: D102
        return L1(self.l1).on_kink(params, step_size, control, slack)

    def check(self, params: Tree, control: Tree) -> None:  # noqa: D102
        for name in ("l1", "l2"):
            weight = like(getattr(self, name), params, control, name)
            check_setting(weight, name, least=0)


@final
@dataclass(frozen=True)
class GroupL1(Prox):
    r""":math:`p(x) = w \sum_g |x_g|_2`: groups of entries are zero together (Yuan & Lin 2006).

    The length of each group is thresholded; at the threshold itself the derivative is that from
    outside, as in `L1`.

    Attributes:
        weight: w >= 0; a number, a tensor with an entry for each group, or a function of the
            control.
        dim: the axes of a leaf that make a group, one group for each place of the others; None for
            the whole leaf.

    Raises:
        ArgumentError: if it is negative.

    Example:
        >>> GroupL1(2.0)(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 0.5, None)
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])
    """

    weight: Setting
    dim: Axes = -1

    def __post_init__(self) -> None:
        check_setting(self.weight, "weight", least=0)
        check_axes(self.dim)

    @property
    def separable(self) -> bool:  # noqa: D102
        return from_the_end(self.dim)

    def __call__(self, params: Tree, step_size: Any, control: Tree) -> Tree:  # noqa: D102
        one_step(step_size, self)
        thresholds = times(like(self.weight, params, control, "weight"), step_size, params)

        def shrink(x: Any, threshold: Any) -> Any:
            if threshold is None:
                return x
            length, t = self._lengths(x, threshold)
            positive = length > 0
            factor = 1 - t / torch.where(positive, length, 1)
            return x * torch.where((length >= t) & positive, factor, 0)

        return tree.map_leaves(shrink, params, thresholds)

    def _lengths(self, x: Tensor, weight: Any) -> tuple[Tensor, Tensor]:
        axes = axes_of(x, self.dim, self)
        w = torch.as_tensor(weight, dtype=x.real.dtype, device=x.device)
        if w.ndim:
            for axis in sorted(axis % x.ndim for axis in axes):
                w = w.unsqueeze(axis)
        return length_of(x, axes), w

    def value(self, params: Tree, control: Tree) -> Tensor:  # noqa: D102
        def total(x: Tensor, weight: Any) -> Tensor:
            length, w = self._lengths(x, weight)
            return (length * w).sum()

        return summed(total, params, like(self.weight, params, control, "weight"))

    def on_kink(  # noqa: D102
        self, params: Tree, step_size: Any, control: Tree, slack: Tree
    ) -> bool:
        thresholds = times(like(self.weight, params, control, "weight"), step_size, params)

        def tie(x: Any, threshold: Any, s: Any) -> bool:
            if threshold is None:
                return False
            length, t = self._lengths(x, threshold)
            near = tied(length, t, length_of(s, axes_of(x, self.dim, self)))
            return bool((near & (t > 0)).any())

        return any(tree.leaves_of(tree.map_leaves(tie, params, thresholds, slack)))

    def check(self, params: Tree, control: Tree) -> None:  # noqa: D102
        check_weights(self.weight, params, control)
        tree.map_leaves(
            lambda x: axes_of(x, self.dim, self) and None if tree.is_variable(x) else None, params
        )


@final
@dataclass(frozen=True, eq=False)
class Product(Prox):
    """An operator for each part of the params: a sum of penalties, a product of sets.

    Attributes:
        parts: a tree like the params, or like the top of it, of operators; None where there is no
            penalty.

    Raises:
        ArgumentError: if a part is anything else, or there is none.

    Example:
        >>> from bilevel.prox import Simplex
        >>> parts = Product({"shares": Simplex(), "shift": None})
        >>> params = {"shares": torch.tensor([2.0, 1.0]), "shift": torch.tensor(-3.0)}
        >>> parts(params, 0.1, None)
        {'shares': tensor([1., 0.]), 'shift': tensor(-3.)}
    """

    parts: Tree

    def __post_init__(self) -> None:
        parts = tree.leaves_of(self.parts)
        for part in parts:
            if not (part is None or isinstance(part, Prox)):
                raise ArgumentError(
                    "the parts of a Product must be operators such as NonNegative(), or None, got "
                    f"{type(part).__name__}."
                )
        if not any(isinstance(part, Prox) for part in parts):
            raise ArgumentError("Product needs at least one operator, got none.")

    def _each(self, *trees: Tree) -> tuple[list[Prox | None], optree.PyTreeSpec, list[list[Tree]]]:
        """The operators, the structure of their places, and what each tree has in them."""
        operators, structure = tree.flatten(self.parts)
        try:
            below = [structure.flatten_up_to(values) for values in trees]
        except ValueError as error:
            raise StructureError(
                f"Product must have the structure of the params, or of the top of it, "
                f"{tree.flatten(trees[0])[1]}, got {structure}."
            ) from error
        return operators, structure, below

    @property
    def separable(self) -> bool:  # noqa: D102
        return all(p is None or p.separable for p in tree.leaves_of(self.parts))

    def __call__(self, params: Tree, step_size: Any, control: Tree) -> Tree:  # noqa: D102
        operators, structure, (own, sizes) = self._each(params, like_params(step_size, params))
        moved = [
            x if p is None else p(x, s, control)
            for p, x, s in zip(operators, own, sizes, strict=True)
        ]
        return optree.tree_unflatten(structure, moved)

    def value(self, params: Tree, control: Tree) -> Tensor:  # noqa: D102
        operators, _, (own,) = self._each(params)
        pairs = zip(operators, own, strict=True)
        return sum(
            (p.value(x, control) for p, x in pairs if p is not None), torch.zeros((), device="cpu")
        )

    def term(self, params: Tree, control: Tree) -> Tensor | float:  # noqa: D102
        operators, _, (own,) = self._each(params)
        pairs = zip(operators, own, strict=True)
        return sum((p.term(x, control) for p, x in pairs if p is not None), 0.0)

    def on_kink(self, params: Tree, step_size: Any, control: Tree, slack: Tree) -> bool:  # noqa: D102
        operators, _, (own, sizes, left) = self._each(params, like_params(step_size, params), slack)
        each = zip(operators, own, sizes, left, strict=True)
        return any(p.on_kink(x, s, control, e) for p, x, s, e in each if p is not None)

    def check(self, params: Tree, control: Tree) -> None:  # noqa: D102
        operators, _, (own,) = self._each(params)
        for p, x in zip(operators, own, strict=True):
            if p is not None:
                p.check(x, control)


def like_params(step_size: Any, params: Tree) -> Tree:
    """A step size for each leaf of the params."""
    if isinstance(step_size, float | int | Tensor):
        return tree.map_leaves(lambda _: step_size, params)
    return step_size
