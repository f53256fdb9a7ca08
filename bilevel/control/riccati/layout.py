"""The variables of a tree as a flat real vector, differentiable and under `torch.vmap`.

A complex leaf is two real dimensions beside each other, so that the dot product is Re<a, b>.
`bilevel.linear.flat` does the same for Krylov methods, by views that no transform can follow.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.tree import Tree


class Layout:
    """How one element of a batch of trees lies in a vector.

    Attributes:
        width: numbers of the vector.
        dtype: of vectors: the widest of the leaves, at least float32.
        device: of the first variable; where there is none, the one given.
        is_one: whether the tree has one variable, and that is a vector of this dtype.
    """

    def __init__(
        self,
        example: Tree,
        *,
        batched: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Lay out the leaves of `example`; with `batched`, of one entry of their leading axis."""
        leaves, self._structure = tree.flatten(example)
        self._batched = batched
        self._kinds = [self._kind(x) for x in leaves]
        self.fixed = [x for x in leaves if not tree.is_variable(x)]
        variables = [x for x in leaves if tree.is_variable(x)]
        self.width = sum(width for _, _, width in filter(None, self._kinds))
        self.dtype = dtype or torch.float32
        if dtype is None:
            for x in variables:
                self.dtype = torch.promote_types(self.dtype, x.dtype.to_real())
        self.device = variables[0].device if variables else device
        # The common case costs least: the tree is one real vector.
        kinds = [kind for kind in self._kinds if kind is not None]
        self.is_one = len(kinds) == 1 and kinds[0][0] == self.dtype and len(kinds[0][1]) == 1
        self._is_vector = self.is_one and isinstance(example, Tensor)

    def _kind(self, leaf: Any) -> tuple[torch.dtype, tuple[int, ...], int] | None:
        """Dtype, shape and width of a variable."""
        if not tree.is_variable(leaf):
            return None
        shape = tuple(leaf.shape[1:] if self._batched else leaf.shape)
        return leaf.dtype, shape, prod(shape) * (2 if leaf.is_complex() else 1)

    def vector(self, values: Tree) -> Tensor:
        """The vector of one tree, shape ``(width,)``."""
        if self._is_vector:
            return values
        return self._joined([x.unsqueeze(0) for x in self._variables(values)], 1)[0]

    def vectors(self, values: Tree, n: int) -> Tensor:
        """The vectors of `n` trees, the entries of a leading axis: shape ``(n, width)``."""
        return self._joined(self._variables(values), n)

    def _variables(self, values: Tree) -> list[Tensor]:
        leaves = tree.leaves_of(values)
        return [x for x, kind in zip(leaves, self._kinds, strict=True) if kind is not None]

    def _joined(self, leaves: list[Tensor], n: int) -> Tensor:
        parts = [
            (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x)
            .reshape(n, -1)
            .to(self.dtype)
            for x in leaves
        ]
        if not parts:
            return torch.zeros(n, 0, dtype=self.dtype, device=self.device)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def tree(self, vector: Tensor, fixed: list[Any]) -> Tree:
        """The tree of one vector; `fixed` are its leaves that are not variables."""
        if self._is_vector:
            return vector
        return self._put(vector, fixed, ())

    def trees(self, vectors: Tensor, fixed: list[Any]) -> Tree:
        """The trees of vectors, one an entry of the leading axis of every leaf."""
        return self._put(vectors, fixed, (vectors.shape[0],))

    def _put(self, vector: Tensor, fixed: list[Any], lead: tuple[int, ...]) -> Tree:
        leaves: list[Any] = []
        constants, start = iter(fixed), 0
        for kind in self._kinds:
            if kind is None:
                leaves.append(next(constants))
                continue
            if self.is_one:
                leaves.append(vector)
                continue
            dtype, shape, width = kind
            part = vector[..., start : start + width]
            start += width
            if dtype.is_complex:
                part = torch.complex(*part.reshape(*lead, *shape, 2).unbind(-1))
            leaves.append(part.reshape(lead + shape).to(dtype))
        return tree.unflatten(self._structure, leaves)
