"""Whether a step, evaluated again, is what it was: state, running cost, and their gradient."""

import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
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
REMEDY = (
    "with the observation, or a field of the dynamics, or keep the graphs with "
    "Checkpointing(block=None)."
)

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


def check_same_gradient(origins: Sequence[object], taped: Callable[[], Block]) -> None:
    """Tape one step twice, the first time that steps of these origins are seen, and compare.

    Args:
        origins: what the steps come from, and their running costs.
        taped: tapes a block of one step.

    Raises:
        ArgumentError: if its state is the same and its gradient is not, or its cost is not.
    """
    # A straight-through estimate gives the same state by another mask: states cannot tell. Nor do
    # they tell of a cost, which is counted where it is evaluated again.
    if all(_known.get(id(origin)) is origin for origin in origins):
        return
    state, costs, gradient = _digests(taped())
    state_again, costs_again, again = _digests(block := taped())
    t, same_state = block.times[0], not _differ(state, state_again)
    if same_state and _differ(costs, costs_again):
        raise ArgumentError(
            f"the running cost at t = {t} gave another value when evaluated again, although "
            f"torch's default generators were restored: pass what it draws in {REMEDY}"
        )
    if same_state and _differ(gradient, again):
        raise ArgumentError(
            f"step {t} of the dynamics{' and its running cost' if costs else ''} gave the same "
            "state with another gradient when evaluated again, although torch's default generators "
            f"were restored: pass what is random in its estimate in {REMEDY}"
        )
    for origin in origins:
        with suppress(TypeError):  # what has no weak references is checked each time
            _known[id(origin)] = origin


def source(function: object) -> object:
    """What a function or an object that is called comes from, also where it is made for a batch."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__code__", type(function))


def _digests(block: Block) -> tuple[list[Digest], list[Digest], list[Digest]]:
    """Of the state and the costs of a block of one step, and of the gradient of their sum."""
    # Numbers, since two gradients side by side might be more than a budget allows.
    ends = block.end, block.costs
    found = autodiff.pull(ends, tree.map_leaves(_ones, ends), (block.states[0], block.controls))
    state, costs, gradient = (
        [Digest.of(x.detach()) for x in tree.leaves_of(each) if tree.is_variable(x)]
        for each in (*ends, found)
    )
    return state, costs, gradient


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
