"""Trees as flat real vectors: what Krylov methods compute with.

A complex leaf is two real dimensions, so that the dot product of flat vectors is Re<a, b>. Those of
several systems side by side are the rows of a matrix.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import shards, tree
from bilevel.errors import StructureError, UnsupportedError
from bilevel.tree import Tree

_AS_THEY_ARE = (torch.float32, torch.float64)


class _Piece(NamedTuple):
    """One leaf and its part of the flat vector."""

    place: int  # of the leaf in the tree
    start: int  # of it
    shape: tuple[int, ...]  # of it: (size,), with columns (columns, size)
    like: Tensor
    strides: tuple[int, ...]
    dtype: torch.dtype  # the leaf's, in the precision of the flat vector
    as_it_is: bool  # whether the leaf is real and of the flat vector's precision and device


class Flat:
    """The vector space of a tree as R^n.

    Leaves of several precisions meet in the widest, at least float32, on the device of the first;
    a product then rounds to each leaf's own.

    Attributes:
        dtype: of flat vectors.
        device: of flat vectors.
        width: dimension of one system.
        shape: of flat vectors, (width,), with columns (columns, width).
    """

    def __init__(self, vector: Tree, name: str, columns: int | None = None) -> None:
        """Lay out the leaves of `vector`."""
        if shards.any_shard(tree.leaves_of(vector)):
            raise UnsupportedError(
                f"a linear system cannot be solved for {name} in parts (DTensor): take a method "
                "that solves none, such as OneStep() or MLM(), and certificate=None, or pass "
                "params that are whole."
            )
        self._template, self._columns = vector, columns
        # The common cases cost least: the tree is one real tensor, a flat vector even.
        self._is_tensor = isinstance(vector, Tensor) and vector.dtype in _AS_THEY_ARE
        self._is_vector = self._is_tensor and vector.ndim == 1 and not columns
        if self._is_tensor and not columns:
            self.dtype, self.device, self._shape = vector.dtype, vector.device, vector.shape
            self.width = vector.numel()
            self.shape = (self.width,)
            return
        leaves, self._structure = tree.flatten(vector)
        self._check_leaves(leaves, name)
        self._n_leaves = len(leaves)
        present = [(i, leaf) for i, leaf in enumerate(leaves) if leaf is not None]
        self.dtype = torch.float32
        for _, leaf in present:
            self.dtype = torch.promote_types(self.dtype, leaf.dtype.to_real())
        self.device = present[0][1].device if present else torch.device("cpu")
        # Complex leaves first: a complex view has to begin at an even place.
        present.sort(key=lambda item: not item[1].is_complex())
        sizes = [x.numel() * (2 if x.is_complex() else 1) // (columns or 1) for _, x in present]
        self.width = sum(sizes)
        self.shape = (columns, self.width) if columns else (self.width,)
        self._pieces = [
            self._piece(place, start, size, leaf)
            for (place, leaf), start, size in zip(
                present, itertools.accumulate([0, *sizes]), sizes, strict=False
            )
        ]
        self._shape = vector.shape if isinstance(vector, Tensor) else torch.Size()

    def _check_leaves(self, leaves: list[Any], name: str) -> None:
        for i, leaf in enumerate(leaves):
            if leaf is None:
                continue
            if not tree.is_variable(leaf):
                kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise StructureError(
                    f"{tree.leaf_names(self._template, name)[i]} must be a floating-point or "
                    f"complex tensor, or None where there is no variable, got {kind}."
                )
            if self._columns and leaf.shape[:1] != (self._columns,):
                raise StructureError(
                    f"{tree.leaf_names(self._template, name)[i]} must have a leading axis of "
                    f"length {self._columns}, one place a column, got shape {tuple(leaf.shape)}; "
                    "stack the columns there, or use an operator without columns."
                )

    def _piece(self, place: int, start: int, size: int, leaf: Tensor) -> _Piece:
        strides = leaf.contiguous().stride()
        return _Piece(
            place,
            start,
            (self._columns, size) if self._columns else (size,),
            leaf,
            (self.width, *strides[1:]) if self._columns else strides,
            self.dtype.to_complex() if leaf.is_complex() else self.dtype,
            leaf.dtype == self.dtype and leaf.device == self.device,
        )

    def check(self, found: Tree, name: str, source: str) -> None:
        """Refuse a tree that is no vector of this space; None counts as zero."""
        if self._is_tensor and tree.alike(found, self._template):
            return
        leaves, structure = tree.flatten(found)
        wanted, expected = tree.flatten(self._template)
        if structure == expected:
            leaves = [
                old if new is None or (old is None and not tree.is_variable(new)) else new
                for new, old in zip(leaves, wanted, strict=True)
            ]
            found = tree.unflatten(structure, leaves)
        tree.check_like(found, self._template, name, source)

    def vector(self, vector: Tree) -> Tensor:
        """The flat vector of a tree; it may share memory with the tree."""
        if self._is_tensor:
            if vector is None:
                return self.zeros()
            return vector if self._is_vector else vector.reshape(self.shape).contiguous()
        leaves: list[Any] = self._structure.flatten_up_to(vector)
        parts = [
            leaves[piece.place].reshape(piece.shape)
            if piece.as_it_is and leaves[piece.place] is not None
            else self._part(leaves[piece.place], piece)
            for piece in self._pieces
        ]
        if not parts:
            return self.zeros()
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, -1)

    def _part(self, leaf: Tensor | None, piece: _Piece) -> Tensor:
        if leaf is None:
            return torch.zeros(piece.shape, dtype=self.dtype, device=self.device)
        leaf = leaf.to(device=self.device, dtype=piece.dtype)
        if leaf.is_complex():
            leaf = torch.view_as_real(leaf.resolve_conj())
        return leaf.reshape(piece.shape)

    def tree(self, vector: Tensor) -> Tree:
        """The tree of a contiguous vector, sharing its memory where it can."""
        if self._is_tensor:
            return vector if self._is_vector else vector.view(self._shape)
        leaves: list[Any] = [None] * self._n_leaves
        # Leaves are views: no product copies its argument.
        base = vector.storage_offset()
        for place, start, shape, like, strides, dtype, as_it_is in self._pieces:
            leaves[place] = (
                # One call where a slice and a view would be two.
                vector.as_strided(like.shape, strides, base + start)
                if as_it_is
                else vector[..., start : start + shape[-1]]
                .reshape(-1)
                .view(dtype)
                .view(like.shape)
                .to(like.device, like.dtype)
            )
        return tree.unflatten(self._structure, leaves)

    def copied(self, vector: Tensor) -> Tree:
        """The tree of a flat vector, each leaf in memory of its own; at most `vector` itself."""
        if self._is_vector:
            return vector
        return tree.map_leaves(
            lambda leaf: leaf if leaf is None else leaf.clone(), self.tree(vector)
        )

    def zeros(self) -> Tensor:
        """The zero vector."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
