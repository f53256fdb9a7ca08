r"""Whether a point is a stable fixed point of the inner iteration: the curvature there, probed.

A saddle has a hypergradient too, and every system is solved there: whatever looks along the inner
gradient and that of F alone may never meet the directions that lead down. So a few products are
spent on a random start: Lanczos on a symmetric derivative J of the residual, Arnoldi on any other.
An eigenvalue of J with negative real part is one of :math:`\partial\Phi/\partial\theta` beyond 1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.errors import DivergenceError
from bilevel.linear.flat import Flat
from bilevel.linear.operator import Operator
from bilevel.tree import Tree

# Five to eight products found the negative curvature of every net tried; a shallow one among many
# unknowns takes more, and beside many inner steps these cost little.
DIRECTIONS, MOST_DIRECTIONS, STEPS_EACH = 12, 48, 10
INFINITE = "the curvature of the inner objective is not finite at the params."


@dataclass(frozen=True, eq=False)
class Curvature:
    """What a probe met of the spectrum of J, from inside: the ends of it are further out.

    Attributes:
        smallest: least Ritz value, its real part; with columns that of the worst column.
        largest: magnitude of the largest Ritz value.
        directions: products made, by a probe that had to begin again those of each beginning.
        vector: unit vector of the least Ritz value; None where J is not symmetric.
    """

    smallest: float
    largest: float
    directions: int
    vector: Tree = None

    def negative(self, eps: float) -> bool:
        """Whether the least value is below zero by more than rounding lets it seem."""
        return self.smallest < -math.sqrt(eps) * self.largest


def probe(operator: Operator, like: Tree, directions: int, seed: int) -> Curvature:
    """The curvature of an operator, from a random start.

    Args:
        operator: J or its adjoint.
        like: a vector of its space.
        directions: products at most.
        seed: of the start.

    Returns:
        What was met.
    """
    flat = Flat(like, "params", operator.columns)
    if not flat.width:
        return Curvature(0.0, 0.0, 0)
    start = torch.randn(
        flat.shape,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
        device="cpu",
    )
    start = start.to(device=flat.device, dtype=flat.dtype).reshape(-1, flat.width)
    with autodiff.paused():
        if operator.symmetric:
            return _lanczos(operator, flat, start, min(directions, flat.width))
        return _arnoldi(operator, flat, start, min(directions, flat.width))


def spectrum(matrix: Tensor, like: Tree, *, symmetric: bool) -> Curvature:
    """The curvature of a matrix on the flat vectors of a tree: all of it."""
    if not bool(matrix.isfinite().all()):
        raise DivergenceError(INFINITE)
    if not symmetric:
        found = torch.linalg.eigvals(matrix.double())
        return Curvature(float(found.real.min()), float(found.abs().max()), len(matrix))
    values, vectors = torch.linalg.eigh((matrix + matrix.mT).double() / 2)
    flat = Flat(like, "params")
    vector = flat.copied(vectors[:, 0].to(matrix).contiguous())
    return Curvature(float(values[0]), float(values.abs().max()), len(matrix), vector)


def _applied(operator: Operator, flat: Flat, v: Tensor) -> Tensor:
    return flat.vector(operator.apply(flat.tree(v.reshape(flat.shape).contiguous()))).reshape(
        v.shape
    )


def _basis(
    operator: Operator, flat: Flat, start: Tensor, steps: int
) -> tuple[Tensor, list[Tensor]]:
    """Orthonormal Krylov vectors (columns, steps, width), and J on the span of each column's."""
    basis = start.new_zeros(len(start), steps, flat.width)
    matrix = start.new_zeros(len(start), steps, steps)
    v = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
    sizes = [steps] * len(start)
    for j in range(steps):
        basis[:, j] = v
        w = _applied(operator, flat, v)
        size = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        known = basis[:, : j + 1]
        for _ in range(2):  # one Gram-Schmidt pass loses orthogonality
            h = (known @ w[..., None])[..., 0]
            w = w - (h[:, None] @ known)[:, 0]
            matrix[:, : j + 1, j] += h
        tail = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        # What is left of an invariant subspace is rounding: that column ends, with rows of zeros.
        ended = tail <= 10 * torch.finfo(w.dtype).eps * size
        sizes = [
            min(known_size, j + 1) if end else known_size
            for known_size, end in zip(sizes, ended[:, 0].tolist(), strict=True)
        ]
        v = torch.where(ended, 0, w / torch.where(ended, 1, tail))
        if j + 1 < steps:
            matrix[:, j + 1, j] = torch.where(ended, 0, tail)[:, 0]
    if not bool(matrix.isfinite().all()):
        raise DivergenceError(INFINITE)
    return basis, [H[:n, :n] for H, n in zip(matrix.double().cpu(), sizes, strict=True)]


def _lanczos(operator: Operator, flat: Flat, start: Tensor, steps: int) -> Curvature:
    basis, squares = _basis(operator, flat, start, steps)
    found = [torch.linalg.eigh((T + T.mT) / 2) for T in squares]
    worst = min(range(len(found)), key=lambda k: float(found[k][0][0]))
    values, vectors = found[worst]
    vector = torch.zeros_like(start)
    vector[worst] = vectors[:, 0].to(basis) @ basis[worst, : len(values)]
    largest = max(float(each.abs().max()) for each, _ in found)
    there = flat.copied(vector.reshape(flat.shape).contiguous())
    return Curvature(float(values[0]), largest, steps, there)


def _arnoldi(operator: Operator, flat: Flat, start: Tensor, steps: int) -> Curvature:
    # Ritz values of an operator that is not normal may lie where no eigenvalue is: one that says
    # "unstable" counts if it stays where it is when the space grows.
    before, made, limit = -math.inf, 0, 4 * steps
    while True:
        _, squares = _basis(operator, flat, start, steps)
        made += steps
        values = [torch.linalg.eigvals(H) for H in squares]
        least = min(float(each.real.min()) for each in values)
        largest = max(float(each.abs().max()) for each in values)
        settled = least >= 0 or abs(least - before) <= 0.1 * abs(least) or steps == flat.width
        if settled or steps >= limit:
            return Curvature(least if settled else 0.0, largest, made)
        before, steps = least, min(2 * steps, flat.width)


def rayleigh(operator: Operator, vector: Tree) -> float:
    """<v, J v> of a unit vector."""
    return float(tree.inner(vector, operator.apply(vector)))
