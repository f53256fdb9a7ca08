r"""Equations whose solution is a function: R(w, a) = 0, and the linear ones that differentiate it.

.. math::
    \text{reverse} \quad v \mapsto -R_a^* q, \; R_w^* q = v \qquad
    \text{forward} \quad e \mapsto -R_w^{-1} R_a e

Both systems are equations again, in (w, a, v): so every order and nesting of derivatives exists.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from bilevel.autodiff import (
    Dims,
    Function,
    Linearisation,
    at_places,
    mapped,
    member,
    placed,
    pull_at,
    pull_in,
    push_at,
    push_in,
    put,
    varies,
)
from bilevel.errors import StructureError
from bilevel.implicit_function.question import Form, Question
from bilevel.implicit_function.systems import solved_system

Tensors = list[Tensor]


@dataclass(frozen=True, eq=False)
class Level:
    """One vmap around an equation.

    Attributes:
        size: members.
        dims: which arguments have a leading axis of them, 0 or None; solutions always have one.
    """

    size: int
    dims: Dims


@dataclass(frozen=True, eq=False)
class Equation(ABC):
    """An equation as a function of its leaves, tensors all; its solutions come first.

    Attributes:
        question: what the user asked.
        levels: the vmaps around it, the innermost first.
    """

    question: Question
    levels: tuple[Level, ...] = ()

    @abstractmethod
    def solved(self, leaves: Tensors) -> Tensors:
        """The solution, of plain tensors."""

    @abstractmethod
    def unknowns(self, outputs: Tensors) -> Tensors:
        """What of the outputs is solved for."""

    @abstractmethod
    def spread(self, values: Tensors, outputs: Tensors) -> list[Tensor | None]:
        """Values of the unknowns in the places of all outputs."""

    @abstractmethod
    def adjoint(self, outputs: Tensors, leaves: Tensors) -> "tuple[Linear, Tensors]":
        """The equation of the adjoint of the derivative in the unknowns, and its point."""

    @abstractmethod
    def tangent(self, outputs: Tensors, leaves: Tensors) -> "tuple[Linear, Tensors]":
        """The equation of that derivative itself, and its point."""

    @abstractmethod
    def pulled(
        self, outputs: Tensors, leaves: Tensors, q: Tensors, wanted: list[bool]
    ) -> list[Tensor | None]:
        """Minus the adjoint of the derivative in the leaves, applied to q."""

    @abstractmethod
    def pushed(self, outputs: Tensors, leaves: Tensors, directions: list[Tensor | None]) -> Tensors:
        """Minus the derivative in the leaves, along directions."""

    @abstractmethod
    def batched(self, size: int, dims: Dims, leaves: Tensors) -> "tuple[Equation, Tensors]":
        """The equation of all members of a batch, and its leaves."""

    @property
    def values(self) -> Function:
        """R, of the tensors of solution and arguments, of all members at once."""
        fixed = (0,) * self.question.n
        return reduce(
            lambda f, level: mapped(f, level.size, (*fixed, *level.dims)),
            self.levels,
            self.question.values,
        )


@dataclass(frozen=True, eq=False)
class Root(Equation):
    """R(w, a) = 0, solved by the user; its leaves are the arguments."""

    def solved(self, leaves: Tensors) -> Tensors:  # noqa: D102
        complaints: list[str] = []
        outputs = self._solved(leaves, self.levels, complaints)
        if complaints:
            many = f" (and {len(complaints) - 1} more members)" if len(complaints) > 1 else ""
            self.question.complain(complaints[0] + many)
        return outputs

    def _solved(self, leaves: Tensors, levels: tuple[Level, ...], complaints: list[str]) -> Tensors:
        if not levels:
            return self._one(leaves, complaints)
        if self.question.vectorized:
            return self._at_once(leaves, levels, complaints)
        outer = levels[-1]
        each = [
            self._solved(member(leaves, outer.dims, k), levels[:-1], complaints)
            for k in range(outer.size)
        ]
        return [torch.stack(parts) for parts in zip(*each, strict=True)]

    def _one(self, leaves: Tensors, complaints: list[str]) -> Tensors:
        question = self.question
        solution, aux = question.solved(leaves)
        self._keep(solution, aux)
        if complaint := question.check(leaves):
            complaints.append(complaint)
        return [*solution.tensors, *aux.tensors]

    def _keep(self, solution: Form, aux: Form) -> None:
        question = self.question
        known = getattr(question, "solution", None)
        same = known is None or (
            known.structure == solution.structure and known.alike == solution.alike
        )
        if not same:
            raise StructureError(
                "solve must return solutions of one structure, shape and dtype for all members of "
                f"a batch, got {known and known.alike} and {solution.alike}."
            )
        question.solution, question.aux = solution, aux

    def _at_once(
        self, leaves: Tensors, levels: tuple[Level, ...], complaints: list[str]
    ) -> Tensors:
        """One call for all members, those of nested batches side by side."""
        sizes, question = [level.size for level in reversed(levels)], self.question
        total, flat = math.prod(sizes), []
        for i, x in enumerate(leaves):
            here = [level.dims[i] is not None for level in reversed(levels)]
            axes = iter(x.shape[: sum(here)])
            shown = [next(axes) if has else 1 for has in here]
            own = x.shape[sum(here) :]
            flat.append(x.reshape(*shown, *own).expand(*sizes, *own).reshape(total, *own))
        solution, aux = question.solved(flat)
        for x in solution.tensors:
            if x.shape[:1] != (total,):
                raise StructureError(
                    f"solve must return solutions with a leading axis of {total} members, as "
                    f"vectorized=True says, got shape {tuple(x.shape)}."
                )
        for k in range(total):
            one = Form(solution.tree([x[k] for x in solution.tensors]))
            self._keep(one, aux)
            if complaint := question.check([x[k] for x in flat]):
                complaints.append(complaint)
        return [x.reshape(*sizes, *x.shape[1:]) for x in (*solution.tensors, *aux.tensors)]

    def unknowns(self, outputs: Tensors) -> Tensors:  # noqa: D102
        return [outputs[i] for i in self.question.solution.variables]

    def spread(self, values: Tensors, outputs: Tensors) -> list[Tensor | None]:  # noqa: D102
        found: list[Tensor | None] = [None] * len(outputs)
        for i, x in zip(self.question.solution.variables, values, strict=True):
            found[i] = x
        return found

    def adjoint(self, outputs: Tensors, leaves: Tensors) -> "tuple[Linear, Tensors]":  # noqa: D102
        point = [*outputs[: self.question.n], *leaves]
        return Linear(self.question, self.levels, transposed=True), point

    def tangent(self, outputs: Tensors, leaves: Tensors) -> "tuple[Linear, Tensors]":  # noqa: D102
        point = [*outputs[: self.question.n], *leaves]
        return Linear(self.question, self.levels, transposed=False), point

    def pulled(  # noqa: D102
        self, outputs: Tensors, leaves: Tensors, q: Tensors, wanted: list[bool]
    ) -> list[Tensor | None]:
        n, point = self.question.n, [*outputs[: self.question.n], *leaves]
        places = [i for i, x in enumerate(leaves) if wanted[i] and varies(x)]
        found = pull_in(self.values, [n + i for i in places], point, [-x for x in q])
        return placed(found, places, len(leaves))

    def pushed(  # noqa: D102
        self, outputs: Tensors, leaves: Tensors, directions: list[Tensor | None]
    ) -> Tensors:
        n, point = self.question.n, [*outputs[: self.question.n], *leaves]
        along = {n + i: e for i, e in enumerate(directions) if e is not None}
        return [-x for x in push_in(self.values, [*along], point, [*along.values()])]

    def batched(self, size: int, dims: Dims, leaves: Tensors) -> "tuple[Equation, Tensors]":  # noqa: D102
        return replace(self, levels=(*self.levels, Level(size, dims))), leaves


@dataclass(frozen=True, eq=False)
class Linear(Equation):
    """A q = b with A = R_w or its adjoint at (w, a); its leaves are those of w, a and b.

    Attributes:
        transposed: whether A is the adjoint.
    """

    transposed: bool = False

    def _parts(self, leaves: Tensors) -> tuple[Tensors, Tensors]:
        n = len(self.question.solution.variables)
        return leaves[:-n], leaves[-n:]

    def solved(self, leaves: Tensors) -> Tensors:  # noqa: D102
        point, rhs = self._parts([x.detach() for x in leaves])
        if self.question.kept is not None:
            return self.question.kept(point[: self.question.n], rhs, len(self.levels))
        values, places = self.values, self.question.solution.variables
        residual = Linearisation(
            lambda ws: list(values(*put(point, places, ws))),
            [point[i] for i in places],
            name=self.question.name,
        )
        sizes = [level.size for level in reversed(self.levels)]
        return solved_system(self.question, residual, rhs, sizes, transposed=self.transposed)

    def unknowns(self, outputs: Tensors) -> Tensors:  # noqa: D102
        return outputs

    def spread(self, values: Tensors, outputs: Tensors) -> list[Tensor | None]:  # noqa: ARG002, D102
        return list(values)

    def adjoint(self, outputs: Tensors, leaves: Tensors) -> "tuple[Linear, Tensors]":  # noqa: ARG002, D102
        return replace(self, transposed=not self.transposed), self._parts(leaves)[0]

    def tangent(self, outputs: Tensors, leaves: Tensors) -> "tuple[Linear, Tensors]":  # noqa: ARG002, D102
        return self, self._parts(leaves)[0]

    def _product(self, *tensors: Tensor) -> Tensors:
        """A y, of the tensors of w and a and of y."""
        places = self.question.solution.variables
        derivative = pull_at if self.transposed else push_at
        return at_places(derivative, self.values, len(tensors) - len(places), places, *tensors)

    def pulled(  # noqa: D102
        self, outputs: Tensors, leaves: Tensors, q: Tensors, wanted: list[bool]
    ) -> list[Tensor | None]:
        point, _ = self._parts(leaves)
        places = [i for i, x in enumerate(point) if wanted[i] and varies(x)]
        found = pull_in(self._product, places, [*point, *outputs], [-x for x in q])
        return [*placed(found, places, len(point)), *q]

    def pushed(  # noqa: D102
        self, outputs: Tensors, leaves: Tensors, directions: list[Tensor | None]
    ) -> Tensors:
        point, rhs = self._parts(leaves)
        along = {i: e for i, e in enumerate(directions[: len(point)]) if e is not None}
        found = [
            torch.zeros_like(b) if e is None else e
            for b, e in zip(rhs, directions[len(point) :], strict=True)
        ]
        if not along:
            return found
        moved = push_in(self._product, [*along], [*point, *outputs], [*along.values()])
        return [b - x for b, x in zip(found, moved, strict=True)]

    def batched(self, size: int, dims: Dims, leaves: Tensors) -> "tuple[Equation, Tensors]":  # noqa: D102
        # Solutions and right-hand sides always have the axis of members: the system then is block
        # diagonal, and one product serves all members.
        n, b = self.question.n, len(leaves) - len(self.question.solution.variables)
        leaves = [
            x.expand(size, *x.shape) if d is None and (i < n or i >= b) else x
            for i, (x, d) in enumerate(zip(leaves, dims, strict=True))
        ]
        return replace(self, levels=(*self.levels, Level(size, dims[n:b]))), leaves
