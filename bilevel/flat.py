"""Trees as flat real vectors: what Krylov methods compute with.

A complex leaf is two real dimensions, so that the dot product of flat vectors is Re<a, b>.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import tree
from bilevel.errors import StructureError
from bilevel.tree import Tree


class _Piece(NamedTuple):
    """One leaf and its part of the flat vector."""

    place: int  # of the leaf in the tree
    start: int
    size: int
    like: Tensor
    strides: tuple[int, ...]
    dtype: torch.dtype  # the leaf's, in the precision of the flat vector
    as_it_is: bool  # whether the leaf is real and of the flat vector's precision and device


class Flat:
    """The vector space of a tree as R^n.

    Leaves of several precisions meet in the widest, at least float32, on the device of the first;
    a product then rounds to each leaf's own.
    """

    def __init__(self, vector: Tree, name: str) -> None:
        """Lay out the leaves of `vector`.

        Args:
            vector: floating-point and complex tensors, None elsewhere.
            name: what the user calls it.

        Raises:
            StructureError: if a leaf is anything else.
        """
        leaves, self._structure = tree.flatten(vector)
        for i, leaf in enumerate(leaves):
            if leaf is not None and not tree.is_variable(leaf):
                kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise StructureError(
                    f"{tree.leaf_names(vector, name)[i]} must be a floating-point or complex "
                    f"tensor, or None where there is no variable, got {kind}."
                )
        self._template = vector
        self._n_leaves = len(leaves)
        present = [(i, leaf) for i, leaf in enumerate(leaves) if leaf is not None]
        self.dtype = torch.float32
        for _, leaf in present:
            self.dtype = torch.promote_types(self.dtype, leaf.dtype.to_real())
        self.device = present[0][1].device if present else torch.device("cpu")
        # Complex leaves first: a complex view has to begin at an even place.
        present.sort(key=lambda item: not item[1].is_complex())
        self.n = 0
        self._pieces: list[_Piece] = []
        for place, leaf in present:
            piece = self._piece(place, leaf)
            self._pieces.append(piece)
            self.n += piece.size
        # The common cases cost least: the tree is one real tensor, a flat vector even.
        self._is_tensor = isinstance(vector, Tensor) and self._pieces[0].as_it_is
        self._is_vector = self._is_tensor and vector.ndim == 1
        self._shape = vector.shape if isinstance(vector, Tensor) else torch.Size()

    def _piece(self, place: int, leaf: Tensor) -> _Piece:
        complex_ = leaf.is_complex()
        return _Piece(
            place,
            self.n,
            leaf.numel() * (2 if complex_ else 1),
            leaf,
            leaf.contiguous().stride(),
            self.dtype.to_complex() if complex_ else self.dtype,
            leaf.dtype == self.dtype and leaf.device == self.device,
        )

    def check(self, found: Tree, name: str, source: str) -> None:
        """Refuse a tree that is no vector of this space; None counts as zero.

        Args:
            found: the tree.
            name: what to call it.
            source: who made it and what it must match.

        Raises:
            StructureError: naming the leaf that differs.
        """
        if self._is_tensor and tree.alike(found, self._template):
            return
        leaves, structure = tree.flatten(found)
        if structure == self._structure:
            wanted = tree.leaves_of(self._template)
            leaves = [
                old if new is None or (old is None and not tree.is_variable(new)) else new
                for new, old in zip(leaves, wanted, strict=True)
            ]
            found = tree.unflatten(structure, leaves)
        tree.check_like(found, self._template, name, source)

    def vector(self, vector: Tree) -> Tensor:
        """The flat vector of a tree; it may share memory with the tree."""
        if self._is_tensor and isinstance(vector, Tensor):
            return vector if self._is_vector else vector.reshape(-1)
        leaves: list[Any] = self._structure.flatten_up_to(vector)
        parts = [
            leaves[piece.place].reshape(-1)
            if piece.as_it_is and leaves[piece.place] is not None
            else self._part(leaves[piece.place], piece)
            for piece in self._pieces
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else self.zeros()

    def _part(self, leaf: Tensor | None, piece: _Piece) -> Tensor:
        if leaf is None:
            return torch.zeros(piece.size, dtype=self.dtype, device=self.device)
        leaf = leaf.to(device=self.device, dtype=piece.dtype)
        if leaf.is_complex():
            leaf = torch.view_as_real(leaf.resolve_conj())
        return leaf.reshape(-1)

    def tree(self, vector: Tensor) -> Tree:
        """The tree of a contiguous vector, sharing its memory where it can.

        Args:
            vector: at an even place of its storage if there are complex leaves.

        Returns:
            The tree.
        """
        if self._is_tensor:
            return vector if self._is_vector else vector.view(self._shape)
        leaves: list[Any] = [None] * self._n_leaves
        base = vector.storage_offset()
        for place, start, size, like, strides, dtype, as_it_is in self._pieces:
            leaves[place] = (
                # One call where a slice and a view would be two.
                vector.as_strided(like.shape, strides, base + start)
                if as_it_is
                else vector[start : start + size]
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
        return torch.zeros(self.n, dtype=self.dtype, device=self.device)
