"""What the user asks: a solver and a residual, with the trees that go in and come out."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

from bilevel import autodiff, tree
from bilevel.checks import check_scalar
from bilevel.dynamics.closures import tensors_of
from bilevel.errors import DivergenceError, LostGradientError, StructureError
from bilevel.linear.operator import LinearSolver
from bilevel.outer.watching import OnFailure, report
from bilevel.tree import Tree

REMEDY = "Pass it as an argument"
Kept = Callable[[list[Tensor], list[Tensor], int], list[Tensor]]


class Form:
    """The structure of a tree and its leaves that are no tensors; the tensors come and go."""

    def __init__(self, values: Tree) -> None:
        """Take the form of a tree."""
        self.leaves, self.structure = tree.flatten(values)
        self.places = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor)]
        self.tensors = [self.leaves[i] for i in self.places]
        self.leaves = [None if isinstance(x, Tensor) else x for x in self.leaves]
        self.variables = [i for i, x in enumerate(self.tensors) if tree.is_variable(x)]
        self.alike = [(x.shape, x.dtype) for x in self.tensors]

    def tree(self, tensors: list[Tensor] | tuple[Tensor, ...]) -> Tree:
        """The tree with these tensors."""
        leaves = list(self.leaves)
        for i, x in zip(self.places, tensors, strict=True):
            leaves[i] = x
        return tree.unflatten(self.structure, leaves)


@dataclass(eq=False)
class Question:
    """One call of an implicit function.

    Attributes:
        solve: of the arguments.
        residual: of the solution and the arguments; an objective stands for its gradient.
        objective: whether `residual` is one.
        linear: solver of the linear systems; None chooses.
        has_aux: whether `solve` returns a pair, whose second part is handed on.
        vectorized: whether `solve` takes arguments with a leading axis.
        tolerance: largest residual relative to the terms in it.
        on_failure: what to do beyond.
        given: the form of the arguments, a pair of those by place and those by name.
        mapped: whether it was asked under a transform of `torch.func`.
        kept: solver of the linear systems that kept factors of each solution; it is given the
            tensors of the solution, the right-hand side, and how many axes of batches come first
            in both. The derivative in the solution is symmetric, and how well the equation is
            solved has been looked at.
        solution: the form of the solution, known once there is one.
        aux: the form of what comes with it.
    """

    solve: Callable[..., Any]
    residual: Callable[..., Any]
    objective: bool
    linear: LinearSolver | None
    has_aux: bool
    vectorized: bool
    tolerance: float
    on_failure: OnFailure
    given: Form
    mapped: bool
    kept: Kept | None = None
    solution: Form = field(init=False)
    aux: Form = field(init=False)

    @property
    def name(self) -> str:
        """What the user's function is called."""
        return "the objective" if self.objective else "the residual"

    @property
    def n(self) -> int:
        """Tensors of a solution."""
        return len(self.solution.places)

    def solved(self, arguments: list[Tensor]) -> tuple[Form, Form]:
        """Solution and aux, by a call of `solve` with plain tensors without grad."""
        given, named = self.given.tree([x.detach() for x in arguments])
        with torch.enable_grad():  # for solvers that differentiate by themselves
            found = self.solve(*given, **named)
        aux = None
        if self.has_aux:
            if not isinstance(found, tuple) or len(found) != 2:
                raise StructureError(
                    "solve must return a pair (solution, aux), as has_aux=True says, got "
                    f"{_kind(found)}."
                )
            found, aux = found
        if found is None:
            raise StructureError("solve must return the solution, got None: is a return missing?")
        tree.check_leaves(found, "solution")
        solution = Form(tree.copied(tree.detach(found)))
        if not solution.variables:
            raise StructureError(
                f"solve must return a floating-point or complex tensor, or a tree that holds one, "
                f"got {_kind(found)}."
            )
        self._check_finite(solution)
        return solution, Form(tree.copied(tree.detach(aux)))

    def _check_finite(self, solution: Form) -> None:
        for i in solution.variables:
            x = solution.tensors[i]
            if not bool(x.isfinite().all()):
                name = tree.leaf_names(solution.tree(solution.tensors), "solution")
                bad = int((~x.isfinite()).sum())
                raise DivergenceError(
                    f"solve returned {bad} of {x.numel()} entries of "
                    f"{name[solution.places[i]]} that are not finite: look at its arguments, its "
                    "step size, and whether there is a solution."
                )

    def values(self, *tensors: Tensor, look: bool = False) -> list[Tensor]:
        """The residual, of the tensors of a solution and of the arguments; one a variable.

        Args:
            tensors: those.
            look: refuse an objective that cannot be differentiated twice.

        Returns:
            Its values.
        """
        solution, arguments = tensors[: self.n], tensors[self.n :]
        given, named = self.given.tree(arguments)
        form = self.solution
        if not self.objective:
            found = self.residual(form.tree(solution), *given, **named)
            return self._equations(found)
        variables = [solution[i] for i in form.variables]

        def value(*ws: Tensor) -> list[Tensor]:
            w = form.tree(autodiff.put(solution, form.variables, ws))
            found = check_scalar(self.residual(w, *given, **named), self.name)
            if look:
                autodiff.refuse_hidden(found, (ws, tensors), self.name, twice=True, remedy=REMEDY)
            return [found]

        return autodiff.pull_at(
            value, variables, [torch.ones_like(variables[0].real).sum() * 0 + 1]
        )

    def _equations(self, found: Tree) -> list[Tensor]:
        """The leaves of a residual, each like its variable."""
        leaves, structure = tree.flatten(found)
        form = self.solution
        wanted = [form.tensors[i] for i in form.variables]
        places = [form.places[i] for i in form.variables]
        if structure == form.structure:
            got = [leaves[i] for i in places]
            fits = [
                isinstance(y, Tensor) and y.shape == w.shape and y.dtype == w.dtype
                for y, w in zip(got, wanted, strict=True)
            ]
            if all(fits):
                return got
        tensors = [y for y in leaves if isinstance(y, Tensor)]
        equations, unknowns = (sum(x.numel() for x in xs) for xs in (tensors, wanted))
        if equations != unknowns:
            few = "fewer" if equations < unknowns else "more"
            raise StructureError(
                f"{self.name} has {equations} equations for {unknowns} unknowns, {few} than "
                "needed: return one value for each entry of the solution."
            )
        raise StructureError(
            f"{self.name} must return a tree like the solution, {_kinds(form.tree(form.tensors))}, "
            f"got {_kinds(found)}."
        )

    def check(self, arguments: list[Tensor]) -> str:
        """Refuse a residual that loses a gradient; what to say of one that is not small, if any."""
        solution, form = self.solution.tensors, self.solution
        if self.mapped and any(map(is_functorch_wrapped_tensor, tensors_of(self.residual))):
            raise followed(self.name)  # one that only a transform inside of the residual meets
        point = [
            x.detach().requires_grad_() if i in form.variables else x
            for i, x in enumerate(solution)
        ]
        with torch.enable_grad(), _Refusing(self.name):
            values = self.values(*point, *arguments, look=True)
        autodiff.refuse_hidden(values, point, self.name, remedy=REMEDY)
        if not any(y.requires_grad for y in values):
            raise LostGradientError(
                f"{self.name} does not depend on the solution in a way that can be "
                "differentiated: use it, and look for a detach() or a no_grad() inside."
            )
        size = tree.norm([y.detach() for y in values])
        if not math.isfinite(size):
            raise DivergenceError(
                f"{self.name} is {size} at the solution, which is finite: look for a square root "
                "or a division at zero in it."
            )
        if not size or self.kept is not None:
            return ""
        eps = max(torch.finfo(x.dtype).eps for x in (solution[i] for i in form.variables))
        scale = self._scale(arguments, [y.detach() for y in values], eps)
        if size <= max(self.tolerance, 64 * eps) * scale:
            return ""
        relative = f"{size / scale:.1e} of the terms in it" if scale else "and has no other terms"
        return (
            f"{self.name if not self.objective else 'the gradient of the objective'} is not small "
            f"at the solution that solve returned: its norm is {size:.1e}, {relative}, above "
            f"tolerance={self.tolerance:g}, so that derivatives are those of no solution: solve "
            "further, or check that both are of one problem."
        )

    def _scale(self, arguments: list[Tensor], values: list[Tensor], eps: float) -> float:
        """Size of the terms that cancel in the residual: how it answers to relative changes."""
        step, solution = math.sqrt(eps), self.solution.tensors
        # So that a solution that is zero to rounding passes; what it is beside, arguments tell.
        around = max(tree.norm(solution), tree.norm(arguments))
        least, size = eps**0.75 * (around if 0 < around < 1 else 1.0), 0.0
        for i, group in enumerate((solution, arguments)):
            moved = [x + step * (x + least * (i == 0)) if tree.is_variable(x) else x for x in group]
            both = (*moved, *arguments) if i == 0 else (*solution, *moved)
            try:
                with torch.no_grad():
                    change = tree.norm(tree.subtract(self.values(*both), values)) / step
            except (ValueError, RuntimeError, ArithmeticError):  # outside of what it is defined for
                continue
            size = math.hypot(size, change) if math.isfinite(change) else size
        return size

    def complain(self, text: str) -> None:
        """Warn or raise, as asked."""
        if text:
            report(text, self.on_failure, level=4)


def followed(name: str) -> LostGradientError:
    """The error for a tensor that a transform follows, and that came in by closure."""
    return LostGradientError(
        f"{name} uses a tensor that is being differentiated or mapped but is not among its "
        "arguments; its gradient would be lost: pass it as an argument."
    )


class _Refusing(TorchFunctionMode):
    """Inside, tensors that a transform of `torch.func` outside follows are refused by name."""

    def __init__(self, name: str) -> None:
        """Name the function."""
        super().__init__()
        self.name = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments."""
        # Here no transform is at work: a tensor that belongs to one came in by closure.
        if not autodiff.transformed() and any(
            isinstance(x, Tensor) and is_functorch_wrapped_tensor(x)
            for x in tree.leaves_of((args, kwargs))
        ):
            raise followed(self.name)
        return func(*args, **(kwargs or {}))


def _kind(value: Any) -> str:
    return tree.kind(value)


def _kinds(value: Tree) -> str:
    kinds = tree.map_leaves(tree.kind, value)
    return str(kinds)
