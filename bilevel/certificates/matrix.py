"""The matrix of a small derivative, formed by one pass for all its rows.

Beside twenty unknowns a product is all overhead: its matrix costs no more than two or three of them
and tells the whole spectrum.
"""

import math

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.autodiff import Linearisation
from bilevel.linear.flat import Flat
from bilevel.linear.operator import Operator
from bilevel.tree import Tree

WIDEST = 64  # unknowns up to which a matrix is formed
LARGEST = 2**16  # numbers in the graph up to which; all rows at once take so many times the width


def formed(residual: Linearisation, operator: Operator, like: Tree) -> Tensor | None:
    """The matrix of the adjoint of a derivative in its first argument, on flat real vectors.

    Args:
        residual: the derivative.
        operator: its adjoint by single products, which the matrix is compared with.
        like: a vector of its space.

    Returns:
        Shape (n, n); None where it is too large, or its rows cannot be had together.
    """
    flat = Flat(like, "params")
    n = flat.width
    if operator.columns is not None or not 0 < n <= WIDEST or residual.size > LARGEST:
        return None
    rows = tree.map_leaves(lambda x: None if x is None else x.expand(n, *x.shape), like)
    stacked = Flat(rows, "params", n)
    try:
        with autodiff.paused():
            eye = torch.eye(n, dtype=flat.dtype, device=flat.device)
            matrix = stacked.vector(residual.pull_all(stacked.tree(eye))).mT
    except (RuntimeError, ValueError, TypeError):
        return None  # an operation without a rule for several vectors
    generator = torch.Generator().manual_seed(n)
    v = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu").to(matrix)
    wanted = flat.vector(operator.apply(flat.tree(v)))
    error, size = torch.linalg.vector_norm(matrix @ v - wanted), torch.linalg.vector_norm(matrix)
    sound = bool(error <= math.sqrt(torch.finfo(flat.dtype).eps) * size)  # not where one is NaN
    return matrix if sound else None


def applied(matrix: Tensor, like: Tree, *, symmetric: bool) -> Operator:
    """The operator of a matrix on the flat vectors of a tree."""
    flat = Flat(like, "params")

    def times(A: Tensor, v: Tree) -> Tree:
        return flat.tree(A @ flat.vector(v))

    return Operator(
        lambda v: times(matrix, v),
        adjoint=None if symmetric else lambda v: times(matrix.mT, v),
        symmetric=symmetric,
    )
