"""Constraints of steps and of the end, and the augmented Lagrangian that meets them."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_arguments, check_kind, check_range
from bilevel.errors import ArgumentError, StructureError
from bilevel.tree import Tree

StepConstraint = Callable[[Tree, Tree, int], Tensor]  # (readout(u(t-1)), theta_t, t)
EndConstraint = Callable[[Tree, Tree], Tensor]  # (readout(u(T)), control)


@final
@dataclass(frozen=True)
class Constraints:
    """What a solution must meet beside the dynamics, found by an augmented Lagrangian.

    Functions see what the costs see, and return a real tensor of any shape, the same at every t.
    Their multipliers are found by the method of multipliers (Howell, Jackson & Manchester 2019,
    doi:10.1109/IROS40897.2019.8967788): Newton's method for each estimate of them.

    Attributes:
        inequality: c(u(t-1), theta_t, t) <= 0 at t = 1..T.
        equality: c(u(t-1), theta_t, t) = 0 at t = 1..T.
        end_inequality: c(u(T), control) <= 0.
        end_equality: c(u(T), control) = 0.
        tolerance: for the largest violation.
        weight: of the squared violation to begin with; it grows where violations stay.

    Raises:
        ArgumentError: if there is no constraint, or a setting is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.ControlProblem(
        ...     bl.Map(lambda x, u, t: x + u),
        ...     terminal=lambda x, control: 0 * x,
        ...     running=lambda x, u, t: u**2,
        ...     horizon=4,
        ... )
        >>> arrive = bl.control.Constraints(end_equality=lambda x, control: x - 1)
        >>> idle = bl.PerStep.unstack(torch.zeros(4, dtype=torch.float64))
        >>> solver = bl.ControlSolver(problem, bl.Riccati(constraints=arrive))
        >>> found = solver.solve(idle, torch.tensor(0.0, dtype=torch.float64))
        >>> [round(float(u), 6) for u in found.control.steps]
        [0.25, 0.25, 0.25, 0.25]
    """

    inequality: StepConstraint | None = None
    equality: StepConstraint | None = None
    end_inequality: EndConstraint | None = None
    end_equality: EndConstraint | None = None
    tolerance: float = 1e-11
    weight: float = 10.0

    def __post_init__(self) -> None:
        given = [getattr(self, name) for name in NAMES]
        if all(x is None for x in given):
            raise ArgumentError(f"constraints must hold one of {', '.join(NAMES)}, got none.")
        for name, function in zip(NAMES, given, strict=True):
            check_kind(function, Callable | None, name, "a function or None")
            if function is not None:
                more = () if name.startswith("end") else ("t",)
                check_arguments(function, name, "state", "control", *more)
        check_range(self.tolerance, "tolerance", above=0)
        check_range(self.weight, "weight", above=0)

    def at_step(self, state: Tree, theta: Tree, t: Any) -> tuple[Tensor | None, Tensor | None]:
        """Inequality and equality of a step, flat."""
        return (
            None if self.inequality is None else self.inequality(state, theta, t).reshape(-1),
            None if self.equality is None else self.equality(state, theta, t).reshape(-1),
        )

    def at_end(self, state: Tree, control: Tree) -> tuple[Tensor | None, Tensor | None]:
        """Inequality and equality of the end, flat."""
        return (
            None
            if self.end_inequality is None
            else self.end_inequality(state, control).reshape(-1),
            None if self.end_equality is None else self.end_equality(state, control).reshape(-1),
        )


NAMES = ("inequality", "equality", "end_inequality", "end_equality")


@dataclass(frozen=True, eq=False)
class Duals:
    """Multipliers of the constraints of B problems, and the weights of their violations.

    Attributes:
        inequality: ``(B, T, k)``, not negative.
        equality: ``(B, T, k)``.
        end_inequality: ``(B, k)``.
        end_equality: ``(B, k)``.
        weight: ``(B,)``.
    """

    inequality: Tensor
    equality: Tensor
    end_inequality: Tensor
    end_equality: Tensor
    weight: Tensor

    def at(self, problems: Tensor) -> "Duals":
        """Of some of the problems."""
        return Duals(*(getattr(self, field.name)[problems] for field in fields(self)))


@dataclass(frozen=True, eq=False)
class Values:
    """What the constraint functions return, shapes as in `Duals`; zero wide where there is none."""

    inequality: Tensor
    equality: Tensor
    end_inequality: Tensor
    end_equality: Tensor

    def violation(self) -> Tensor:
        """The largest of each problem, ``(B,)``."""
        parts = [
            self.inequality.clamp(min=0).flatten(1),
            self.equality.abs().flatten(1),
            self.end_inequality.clamp(min=0),
            self.end_equality.abs(),
        ]
        return _largest(parts)

    def unmet(self, duals: Duals) -> Tensor:
        """The largest violation, or multiplier of what is not active over its weight: ``(B,)``."""
        w = duals.weight.view(-1, 1)
        parts = [
            torch.maximum(self.inequality, -duals.inequality / w.unsqueeze(2)).abs().flatten(1),
            self.equality.abs().flatten(1),
            torch.maximum(self.end_inequality, -duals.end_inequality / w).abs(),
            self.end_equality.abs(),
        ]
        return _largest(parts)

    def updated(self, duals: Duals, which: Tensor, grown: Tensor) -> Duals:
        """The next estimate of the multipliers, of the problems in `which`."""
        w = duals.weight.view(-1, 1)
        new = (
            (duals.inequality + w.unsqueeze(2) * self.inequality).clamp(min=0),
            duals.equality + w.unsqueeze(2) * self.equality,
            (duals.end_inequality + w * self.end_inequality).clamp(min=0),
            duals.end_equality + w * self.end_equality,
        )
        old = [getattr(duals, name) for name in NAMES]
        kept: list[Any] = [
            torch.where(which.view(-1, *[1] * (a.ndim - 1)), a, b)
            for a, b in zip(new, old, strict=True)
        ]
        kept.append(torch.where(which & grown, duals.weight * 10, duals.weight))
        return Duals(*kept)

    def worst(self, i: int) -> str:
        """The constraint of problem `i` that is violated most, in words."""
        found = []
        for name in NAMES:
            values = getattr(self, name)[i]
            size = values.clamp(min=0) if name.endswith("inequality") else values.abs()
            if size.numel():
                at = int(size.argmax())
                found.append((float(size.flatten()[at]), name, at, size.shape))
        most, name, at, shape = max(found)
        if len(shape) == 1:
            return f"{name}[{at}], violated by {most:.3g}"
        return f"{name}[{at % shape[1]}] at t = {at // shape[1] + 1}, violated by {most:.3g}"


def _largest(parts: list[Tensor]) -> Tensor:
    joined = torch.cat(parts, 1)
    return joined.amax(1) if joined.shape[1] else joined.new_zeros(len(joined))


def penalty(
    inequality: Tensor | None, equality: Tensor | None, mu: Tensor, nu: Tensor, weight: Tensor
) -> Tensor:
    """What the augmented Lagrangian adds to a cost (Rockafellar 1973, doi:10.1007/BF01580138)."""
    total = weight.new_zeros(())
    if inequality is not None:
        pushed = (mu + weight * inequality).clamp(min=0)
        total = total + (pushed.square() - mu.square()).sum() / (2 * weight)
    if equality is not None:
        total = total + (nu * equality).sum() + weight / 2 * equality.square().sum()
    return total


def check_constraint(value: Any, name: str, expected: Any = None) -> torch.Size:
    """Shape of what a constraint returned; refused if it is no real tensor, or of another shape."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise StructureError(f"{name} must return a real tensor, got {tree.kind(value)}.")
    if expected is not None and value.shape != expected:
        raise StructureError(
            f"{name} must return the shape that it has at t = 1, {tuple(expected)}, got "
            f"{tuple(value.shape)}; pad it with constraints that always hold."
        )
    return value.shape
