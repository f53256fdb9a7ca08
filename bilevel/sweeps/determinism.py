"""Whether a step, evaluated again, is what it was: the state it gives, and its gradient."""

import math
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, shards, tree
from bilevel.errors import ArgumentError
from bilevel.sweeps.block import Block
from bilevel.tree import Tree

# Entries of a state that are compared at every block. Whole states are compared where the number of
# blocks from the end is 1, 2, 4, ...: a sweep that memory bounds does not read each twice more.
SAMPLE = 1024

_known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def check_same_state(again: Tree, expected: Tree, name: str, *, whole: bool) -> None:
    """Refuse a state that is not what the forward sweep found; not whole, its first entries."""
    for new, old in zip(tree.leaves_of(again), tree.leaves_of(expected), strict=True):
        if not isinstance(old, Tensor):
            continue
        new, old = shards.local(new.detach()), shards.local(old.detach())
        if not whole and old.is_contiguous() and new.is_contiguous() and old.numel() > SAMPLE:
            new, old = (x.view(-1)[:SAMPLE] for x in (new, old))
        if not (torch.equal(new, old) or _rounded(new, old)):
            raise ArgumentError(
                f"{name} gave another state when evaluated again, although torch's default "
                "generators were restored: pass what is random in with the observation, or a field "
                "of the dynamics, or keep the graphs with Checkpointing(block=None)."
            )


@dataclass(frozen=True)
class Digest:
    """What two evaluations of one leaf of a gradient are compared by, in a few numbers.

    Attributes:
        norm: of the leaf.
        sums: of all its entries, and of the first.
        tolerance: of the norm; rounding that is no difference.
        spread: what a sum may be of a norm.
    """

    norm: float
    sums: tuple[complex, complex]
    tolerance: float
    spread: float

    @classmethod
    def of(cls, x: Tensor) -> "Digest":
        """The digest of a leaf."""
        x = shards.local(x)
        sums = complex(x.sum().item()), complex(x.reshape(-1)[:SAMPLE].sum().item())
        norm = float(torch.linalg.vector_norm(x))
        return cls(norm, sums, _tolerance(x) * norm, math.sqrt(x.numel()))

    def differs(self, other: "Digest") -> bool:
        """Whether the two leaves were not the same."""
        if abs(self.norm - other.norm) > self.tolerance:
            return True
        pairs = zip(self.sums, other.sums, strict=True)
        return any(abs(a - b) > self.tolerance * self.spread for a, b in pairs)


def check_same_gradient(origin: object, taped: Callable[[], Block]) -> None:
    """Tape one step twice, the first time that steps of this origin are seen, and compare.

    Args:
        origin: what the steps come from.
        taped: tapes a block of one step.

    Raises:
        ArgumentError: if its state is the same and its gradient is not.
    """
    # A straight-through estimate gives the same state by another mask: states cannot tell.
    if _known.get(id(origin)) is origin:
        return
    state, gradient = _digests(taped())
    state_again, again = _digests(block := taped())
    if _differ(gradient, again) and not _differ(state, state_again):
        raise ArgumentError(
            f"step {block.times[0]} of the dynamics gave the same state with another gradient when "
            "evaluated again, although torch's default generators were restored: pass what is "
            "random in its estimate in with the observation, or a field of the dynamics, or keep "
            "the graphs with Checkpointing(block=None)."
        )
    with suppress(TypeError):  # what has no weak references is checked each time
        _known[id(origin)] = origin


def _digests(block: Block) -> tuple[list[Digest], list[Digest]]:
    """Of the state that a block of one step leads to, and of the gradient of its sum."""
    # Numbers, since two gradients side by side might be more than a budget allows.
    ones = tree.map_leaves(_ones, block.end)
    found = autodiff.pull(block.end, ones, (block.states[0], block.controls))
    state = [Digest.of(x.detach()) for x in tree.leaves_of(block.end) if tree.is_variable(x)]
    return state, [Digest.of(x) for x in tree.leaves_of(found) if x is not None]


def _ones(leaf: Any) -> Tensor | None:
    return leaf.new_ones(()).expand_as(leaf) if tree.is_variable(leaf) else None


def _differ(first: list[Digest], again: list[Digest]) -> bool:
    return len(first) != len(again) or any(map(Digest.differs, first, again))


def _rounded(new: Tensor, old: Tensor) -> bool:
    """Whether two variables differ by rounding, which in some kernels depends on timing."""
    if not tree.is_variable(old):
        return False
    # Of the largest entry, so that one entry alone counts.
    tolerance = _tolerance(old) * float(old.abs().max())
    return not float((new - old).abs().max()) > tolerance  # NaN is told elsewhere


def _tolerance(x: Tensor) -> float:
    # Single digits of a short dtype, and a thousand units of rounding of a long one, in which
    # many steps of such kernels may add up.
    eps = torch.finfo(x.dtype).eps
    return max(eps, min(1000 * eps, 1e-3))
