"""Bounds on a control, as the numbers of every step have them."""

import math
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.control.riccati.controls import Controls, Point
from bilevel.control.riccati.linearisation import Swept
from bilevel.dynamics.per_step import PerStep
from bilevel.errors import ArgumentError, StructureError, UnsupportedError
from bilevel.tree import Tree

Limit = tuple[Tensor, Tensor, Tensor, Tensor]


class Limits:
    """low <= control <= high, in numbers."""

    def __init__(self, low: Point, high: Point) -> None:
        """Of every problem; infinite where there is no bound."""
        self._low, self._high = low, high

    def around(self, where: Swept) -> Limit:
        """By how much the controls there may change: of the steps, and of what is shared."""
        low, high, point = self._low.at(where.problems), self._high.at(where.problems), where.point
        return (
            low.own - point.own,
            high.own - point.own,
            low.shared - point.shared,
            high.shared - point.shared,
        )

    def steps(self, problems: Tensor) -> tuple[Tensor, Tensor]:
        """Of the steps' own controls."""
        return self._low.own[problems], self._high.own[problems]

    def cut(self, shared: Tensor, problems: Tensor) -> Tensor:
        """What is shared, within its bounds."""
        low, high = self._low.shared[problems], self._high.shared[problems]
        return torch.minimum(torch.maximum(shared, low), high)

    def projected(self, point: Point) -> Point:
        """All controls, within their bounds."""
        own = torch.minimum(torch.maximum(point.own, self._low.own), self._high.own)
        shared = torch.minimum(torch.maximum(point.shared, self._low.shared), self._high.shared)
        return Point(own, shared)

    def free(self, where: Swept, gradient: Point) -> tuple[Tensor, Tensor]:
        """The gradient, zero where it pushes against a bound."""
        low, high, point = self._low.at(where.problems), self._high.at(where.problems), where.point
        own = ((point.own <= low.own) & (gradient.own > 0)) | (
            (point.own >= high.own) & (gradient.own < 0)
        )
        shared = ((point.shared <= low.shared) & (gradient.shared > 0)) | (
            (point.shared >= high.shared) & (gradient.shared < 0)
        )
        return gradient.own * ~own, gradient.shared * ~shared


def limits_of(bounds: Any, control: Tree, controls: Controls) -> Limits:
    """Bounds as the settings have them, on a control.

    Args:
        bounds: (low, high); each a number, a tree like a step's control (or like one that all
            steps share), a `PerStep`, or None in any place that is free.
        control: whose bounds they are.
        controls: its layout.

    Returns:
        The bounds in numbers.

    Raises:
        ArgumentError: if there are not two, one is NaN, or low exceeds high.
        StructureError: if a bound has not the structure or shape of what it bounds.
        UnsupportedError: if it bounds a complex number.
    """
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise ArgumentError(f"bounds must be a pair (low, high), got {bounds!r}.")
    low, high = (
        _like(side, control, name, endless)
        for side, name, endless in zip(bounds, ("low", "high"), (-math.inf, math.inf), strict=True)
    )
    names = tree.leaf_names(control, "control")
    for name, a, b in zip(names, tree.leaves_of(low), tree.leaves_of(high), strict=True):
        if isinstance(a, Tensor) and a.is_floating_point() and bool((a > b).any()):
            i = (a > b).nonzero()[0].tolist()
            at = f"{name}{i or ''}"
            raise ArgumentError(
                f"bounds: low must be at most high, got {float(a[tuple(i)]):g} > "
                f"{float(b[tuple(i)]):g} at {at}; are the two in the wrong order?"
            )
    return Limits(controls.point(low), controls.point(high))


def _like(side: Any, control: Tree, name: str, endless: float) -> Tree:
    """One side as a tree like the control."""
    if isinstance(control, PerStep):
        if not isinstance(side, PerStep):
            side = PerStep([side] * len(control.steps))
        if len(side.steps) != len(control.steps):
            raise StructureError(
                f"bounds: {name}.steps must have one entry per step, {len(control.steps)}, got "
                f"{len(side.steps)}."
            )
        return PerStep(
            [
                _part(x, step, f"{name}.steps[{i}]", endless)
                for i, (x, step) in enumerate(zip(side.steps, control.steps, strict=True))
            ],
            _part(side.initial, control.initial, f"{name}.initial", endless),
            _part(side.shared, control.shared, f"{name}.shared", endless),
        )
    return _part(side, control, name, endless)


def _part(side: Any, part: Tree, name: str, endless: float) -> Tree:
    leaves, structure = tree.flatten(part)
    if side is None or isinstance(side, float | int):
        sides = [side] * len(leaves)
    else:
        sides, found = tree.flatten(side)
        if found != structure:
            raise StructureError(
                f"bounds: {name} must be a number, or a tree like the control that it bounds, "
                f"{structure}, got {found}."
            )
    names = tree.leaf_names(part, name)
    each = [_leaf(x, leaf, at, endless) for x, leaf, at in zip(sides, leaves, names, strict=True)]
    return tree.unflatten(structure, each)


def _leaf(bound: Any, leaf: Any, name: str, endless: float) -> Any:
    if not tree.is_variable(leaf):
        return leaf
    if leaf.is_complex():
        if bound is not None and not isinstance(bound, float | int):
            raise UnsupportedError(f"bounds: {name} bounds a complex control: only real ones have.")
        if bound is not None and math.isfinite(bound):
            raise UnsupportedError(f"bounds: {name} bounds a complex control: only real ones have.")
        return torch.full_like(leaf, complex(endless, endless))
    if bound is None:
        return torch.full_like(leaf, endless)
    value = bound.detach().to(leaf) if isinstance(bound, Tensor) else leaf.new_tensor(bound)
    if bool(value.isnan().any()):
        raise ArgumentError(f"bounds: {name} must be numbers, got NaN.")
    try:
        return value.expand(leaf.shape).clone()
    except RuntimeError:
        raise StructureError(
            f"bounds: {name} must have a shape that fits the control's, {tuple(leaf.shape)}, got "
            f"{tuple(value.shape)}."
        ) from None
