"""Bilevel problems whose hypergradients are known, and a bare torch loop to compare with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from problems import cplx, real, square
from torch import Tensor

import bilevel as bl


@dataclass(frozen=True, eq=False)
class BilevelCase:
    """A bilevel problem at a point.

    Attributes:
        step_size: with which gradient descent converges, within `steps`.
        exact: the hypergradient at the exact inner minimiser.
        minimiser: it.
    """

    name: str
    problem: bl.BilevelProblem
    params: Any
    control: Any
    step_size: float
    steps: int
    exact: Any
    minimiser: Any

    def __repr__(self) -> str:
        return self.name


def ridge(d: int, *, complex_: bool = False, scalar_control: bool = False) -> BilevelCase:
    """|X w - y|^2 / 2n + sum e^alpha |w|^2 / 2, judged by |V w - z|^2 / 2n; alpha real."""
    draw, n = (cplx if complex_ else real), 4 * d + 3
    X, y, V, z = draw(1, n, d), draw(2, n), draw(3, n, d), draw(4, n)
    alpha = real(5) if scalar_control else 0.3 * real(5, d)

    def inner(w, a, batch):
        return square(X @ w - y) / (2 * n) + (a.exp() * (w * w.conj()).real).sum() / 2

    def outer(w, a, batch):
        return square(V @ w - z) / (2 * n)

    H = X.mH @ X / n + torch.diag(alpha.exp().expand(d)).to(X.dtype)
    w = torch.linalg.solve(H, X.mH @ y / n)
    q = torch.linalg.solve(H, V.mH @ (V @ w - z) / n)
    exact = -(q.conj() * alpha.exp() * w).real
    eigenvalues = torch.linalg.eigvalsh(H)
    step_size = 2 / float(eigenvalues[0] + eigenvalues[-1])
    contraction = 1 - step_size * float(eigenvalues[0])
    return BilevelCase(
        f"ridge, d = {d}{', complex' * complex_}{', one weight' * scalar_control}",
        bl.BilevelProblem(inner, outer),
        draw(6, d),
        alpha,
        step_size,
        int(-32 / torch.tensor(contraction + 1e-30).log().item()) + 2,
        exact.sum() if scalar_control else exact,
        w,
    )


def scalar() -> BilevelCase:
    """A 0-d tensor as inner variable and as control: min (w - a)^2 / 2 + w^2, F = (w - 1)^2."""
    a = torch.tensor(0.7, dtype=torch.float64)
    return BilevelCase(
        "0-d tensors",
        bl.BilevelProblem(
            lambda w, a, batch: (w - a) ** 2 / 2 + w**2, lambda w, a, batch: (w - 1) ** 2
        ),
        torch.tensor(0.0, dtype=torch.float64),
        a,
        0.2,
        80,
        2 * (a / 3 - 1) / 3,
        a / 3,
    )


@cache
def trees() -> BilevelCase:
    """Params and control as trees of complex, real, 0-d and integer leaves, F reading both."""
    A, b = 0.3 * cplx(6, 3, 3), cplx(7, 3)
    params = {
        "z": torch.zeros(3, dtype=torch.complex128),
        "pair": (real(8), {"count": torch.tensor([1, 2])}),
    }
    control = {"shift": cplx(9, 3), "log": (real(10), real(11)), "n": 3}

    def inner(p, c, batch):
        x, count = p["pair"][0], p["pair"][1]["count"]
        strength = c["log"][0].exp()
        return (
            square(p["z"] - A @ p["z"].conj() - c["shift"]) / 2
            + strength * square(p["z"]) / 2
            + count.sum() * (x - c["log"][1]) ** 2
            + x * p["z"].real.sum() / 10
        )

    def outer(p, c, batch):
        return (
            square(p["z"] - b) / 2
            + (p["pair"][0] + c["log"][1]) ** 2 * c["n"]
            + square(c["shift"]) / 9
        )

    problem = bl.BilevelProblem(inner, outer)
    minimiser, exact = by_newton(problem, params, control)
    return BilevelCase(
        "trees of complex and integer leaves", problem, params, control, 0.15, 260, exact, minimiser
    )


@cache
def logistic(d: int = 4) -> BilevelCase:
    """Logistic regression with a decay for each weight, and one for the shift of the labels."""
    n = 40
    X, V = real(12, n, d), real(13, n, d)
    truth = real(14, d)
    y, z = (X @ truth > 0).double(), (V @ truth + 0.5 * real(15, n) > 0).double()

    def loss(w, X, y):
        return torch.nn.functional.binary_cross_entropy_with_logits(X @ w, y)

    problem = bl.BilevelProblem(
        lambda w, a, batch: loss(w, X, y) + (a.exp() * w**2).sum() / 2,
        lambda w, a, batch: loss(w, V, z),
    )
    params, control = real(17, d), 0.3 * real(16, d) - 2
    minimiser, exact = by_newton(problem, params, control)
    return BilevelCase("logistic", problem, params, control, 1.5, 400, exact, minimiser)


def by_newton(problem: bl.BilevelProblem, params: Any, control: Any) -> tuple[Any, Any]:
    """The inner minimiser and the exact hypergradient, by dense Newton steps on real vectors."""
    flat, put = _real_vector(params)
    c, put_control = _real_vector(control)

    def inner(v, a):
        return problem.inner(put(v), put_control(a), None)

    gradient = torch.func.grad(inner)
    hessian = torch.func.jacrev(gradient)
    v = flat.clone()
    for _ in range(30):
        step = torch.linalg.solve(hessian(v, c), gradient(v, c))
        v = v - step
        if step.norm() <= 1e-15 * v.norm():
            break
    b, d = torch.func.grad(
        lambda v, a: problem.outer(put(v), put_control(a), None), argnums=(0, 1)
    )(v, c)
    q = torch.linalg.solve(hessian(v, c), b)
    mixed = torch.func.jacrev(gradient, argnums=1)(v, c)
    return put(v), _vector_tree(control, d - mixed.T @ q)


def _real_vector(tree: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    leaves = [x for x in bl.tree.leaves_of(tree) if bl.tree.is_variable(x)]
    parts = [(torch.view_as_real(x) if x.is_complex() else x).reshape(-1) for x in leaves]

    def put(vector: Tensor) -> Any:
        return bl.tree.map_leaves(
            lambda x, v: x if v is None else v, tree, _vector_tree(tree, vector)
        )

    return torch.cat(parts), put


def _vector_tree(tree: Any, vector: Tensor) -> Any:
    """The vector as a gradient in the tree: None in the places of integers."""
    at = 0

    def take(x: Any) -> Any:
        nonlocal at
        if not bl.tree.is_variable(x):
            return None
        size = x.numel() * (2 if x.is_complex() else 1)
        part, at = vector[at : at + size], at + size
        if x.is_complex():
            return torch.complex(*part.reshape(*x.shape, 2).unbind(-1))
        return part.reshape(x.shape)

    return bl.tree.map_leaves(take, tree)


CASES = [
    *(ridge(d) for d in (1, 2, 20, 300)),
    *(ridge(d, complex_=True) for d in (1, 2, 20)),
    ridge(300, complex_=True),
    ridge(2, scalar_control=True),
    ridge(20, complex_=True, scalar_control=True),
    scalar(),
    trees(),
    logistic(),
]


@cache
def unrolled(case: BilevelCase, steps: int) -> Any:
    """The hypergradient of the k-step solution by a bare torch loop of gradient descent."""

    def attached(values: Any) -> Any:
        return bl.tree.map_leaves(
            lambda x: x.clone().requires_grad_() if bl.tree.is_variable(x) else x, values
        )

    def slopes(value: Tensor, values: Any, **settings: bool) -> Any:
        leaves = [x for x in bl.tree.leaves_of(values) if bl.tree.is_variable(x)]
        each = iter(torch.autograd.grad(value, leaves, **settings))
        return bl.tree.map_leaves(lambda x: next(each) if bl.tree.is_variable(x) else None, values)

    control, params = attached(case.control), attached(case.params)
    for _ in range(steps):
        gradient = slopes(case.problem.inner(params, control, None), params, create_graph=True)
        params = bl.tree.map_leaves(
            lambda x, g: x if g is None else x - case.step_size * g, params, gradient
        )
    return slopes(case.problem.outer(params, control, None), control)
