"""The linear systems of implicit functions, solved, and what is said where they are singular."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import Linearisation
from bilevel.implicit_function.question import Question
from bilevel.linear.cg import CG
from bilevel.linear.direct import Dense, Nystrom
from bilevel.linear.gmres import GMRES
from bilevel.linear.operator import LinearResult, LinearSolver, Operator
from bilevel.linear.singular import random_like, shortcoming
from bilevel.tree import Tree

SMALL = 64  # real unknowns up to which a matrix is formed
RTOL = 1e-12


def solved_system(
    question: Question,
    residual: Linearisation,
    rhs: list[Tensor],
    sizes: list[int],
    *,
    transposed: bool,
) -> list[Tensor]:
    """The solution of A q = b; a complaint where there is none.

    Args:
        question: what was asked; its linear solver.
        residual: R, linearised in the solution.
        rhs: b, one tensor a variable, with the axes of the batches first.
        sizes: of those axes.
        transposed: whether A is the adjoint of the derivative.

    Returns:
        q, like b.
    """
    columns = math.prod(sizes)
    inside = [x.shape[len(sizes) :] for x in rhs]

    def flat(xs: list[Tensor]) -> list[Tensor]:
        return [x.reshape(columns, *s) for x, s in zip(xs, inside, strict=True)] if sizes else xs

    def deep(xs: list[Tensor]) -> list[Tensor]:
        return [x.reshape(*sizes, *s) for x, s in zip(xs, inside, strict=True)] if sizes else xs

    def filled(xs: list[Tensor | None], like: list[Tensor]) -> list[Tensor]:
        return [torch.zeros_like(y) if x is None else x for x, y in zip(xs, like, strict=True)]

    def pull(xs: list[Tensor]) -> list[Tensor]:
        return flat(filled(residual.pull(deep(xs)), rhs))

    def push(xs: list[Tensor]) -> list[Tensor]:
        return flat(filled(residual.push(deep(xs)), rhs))

    apply, adjoint = (pull, push) if transposed else (push, pull)
    operator = Operator(
        apply, adjoint, symmetric=question.objective, columns=columns if sizes else None
    )
    b = flat(rhs)
    solver = question.linear or _chosen(operator, b)
    if not operator.symmetric and isinstance(solver, CG | Nystrom | _Krylov):
        operator = replace(operator, symmetric=_is_symmetric(operator, b))
    if operator.symmetric and transposed is False:
        operator = replace(operator, apply=pull, adjoint=pull)  # the cheaper of the two
    found = solver.solve(operator, b)
    question.complain(shortcoming(operator, b, found))
    return deep(found.solution)


@dataclass(frozen=True)
class _Krylov(LinearSolver):
    """Conjugate gradients on symmetric operators, GMRES on others and where those fail."""

    def solve(self, operator: Operator, rhs: Tree, start: Tree | None = None) -> LinearResult:
        found = None
        if operator.symmetric:
            found = CG(RTOL, probes=4).solve(operator, rhs, start)
            if found.converged:
                return found
            start = found.solution
        again = GMRES(restart=100, rtol=RTOL).solve(operator, rhs, start)
        return again if found is None or again.residual < found.residual else found


def _chosen(operator: Operator, b: list[Tensor]) -> LinearSolver:
    """A matrix where it is small."""
    width = sum(x.numel() * (2 if x.is_complex() else 1) for x in b) // (operator.columns or 1)
    return Dense(RTOL) if width <= SMALL else _Krylov()


def _is_symmetric(operator: Operator, b: list[Tensor]) -> bool:
    """Whether it maps a random vector to what its adjoint maps it to."""
    z = random_like(b)
    one, other = operator.apply(z), operator.adjoint(z) if operator.adjoint else None
    eps = max(torch.finfo(x.dtype).eps for x in b)
    return tree.norm(tree.subtract(one, other)) <= math.sqrt(eps) * tree.norm(one)
