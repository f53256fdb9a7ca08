"""When a sweep keeps, advances, tapes and drops: the binomial schedule over blocks of steps.

Pure integers. The steps are cut into blocks; a *snapshot* of block i is the state at its start. A
block is reversed by *taping* it: it is evaluated from its start, recording the graph. Blocks are
*advanced* without a graph to reach the start of one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from math import comb
from typing import NamedTuple


class Do(Enum):
    """What an action does with the current state."""

    KEEP = auto()  # it is the start of the block: keep it as a snapshot
    ADVANCE = auto()  # evaluate steps until it is the start of the block
    TAPE = auto()  # evaluate the block from it, recording the graph, and reverse the block
    LOAD = auto()  # make it the snapshot of the block, which stays kept
    DROP = auto()  # forget the snapshot of the block


class Action(NamedTuple):
    """One thing to do for one block, counted from 0."""

    do: Do
    block: int


def repetitions(n_blocks: int, snapshots: int) -> int:
    """The least r such that C(snapshots + r, snapshots) >= n_blocks.

    No block is advanced more often than r times.

    Args:
        n_blocks: at least 1.
        snapshots: at least 1.

    Returns:
        r.

    Example:
        >>> [repetitions(n, 2) for n in (1, 3, 4, 6, 7)]
        [0, 1, 2, 2, 3]
    """
    if snapshots == 1:
        return n_blocks - 1
    r, reach = 0, 1
    while reach < n_blocks:
        r += 1
        reach = reach * (snapshots + r) // r
    return r


@dataclass(frozen=True)
class Schedule:
    """Reverses `horizon` steps, `block` at a time, with at most `snapshots` states kept.

    The fewest evaluations any schedule needs that keeps no more states and tapes no more than
    `block` steps at a time: with n blocks and r their `repetitions`, r n - C(snapshots + r, r - 1)
    blocks are advanced (Griewank and Walther, "Algorithm 799: Revolve", 2000,
    doi:10.1145/347837.347846). The first block is the short one when `block` does not divide
    `horizon`: it is advanced r times, as often as any.

    Attributes:
        horizon: number of steps, T >= 0.
        block: steps in a block, at least 1.
        snapshots: states kept at most, u(0) among them, at least 1.

    Example:
        >>> schedule = Schedule(horizon=1000, block=10, snapshots=4)
        >>> schedule.n_blocks, schedule.forward_steps / 1000  # evaluations a step
        (100, 4.74)
    """

    horizon: int
    block: int
    snapshots: int

    @cached_property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return -(-self.horizon // self.block)

    def steps(self, i: int) -> range:
        """Steps of block `i`: `range(a, b)` leads from u(a) to u(b)."""
        stop = self.horizon - (self.n_blocks - 1 - i) * self.block
        return range(max(stop - self.block, 0), stop)

    @property
    def forward_steps(self) -> int:
        """Steps evaluated by the forward and the multiplier sweep together.

        Example:
            >>> Schedule(1000, 32, 10).forward_steps
            2616
        """
        if self.n_blocks <= 1:
            return self.horizon
        r = repetitions(self.n_blocks, self.snapshots)
        # T steps taped; block * (r n - C) advanced, less what the short first block lacks r times.
        return (r + 1) * self.horizon - self.block * comb(self.snapshots + r, r - 1)

    def actions(self) -> Iterator[Action]:
        """What to do, in order, beginning at u(0); all before the first TAPE is the forward sweep.

        Yields:
            The actions.

        Example:
            >>> [f"{do.name} {i}" for do, i in Schedule(3, 1, 1).actions()][:6]
            ['KEEP 0', 'ADVANCE 2', 'TAPE 2', 'LOAD 0', 'ADVANCE 1', 'TAPE 1']
        """
        # One range of blocks [start, stop) at a time, the state at `start` kept, s snapshots to
        # spend (that of `start` among them), r repetitions: its right part is reversed first, then
        # its left part, from the snapshot at `start`, with one repetition less.
        start, stop, s = 0, self.n_blocks, self.snapshots
        if not stop:
            return
        r = repetitions(stop, s)
        waiting: list[tuple[int, int, int, int]] = []  # ranges whose start is kept, last first
        yield Action(Do.KEEP, 0)
        while True:
            kept = True
            while stop - start > 1:
                # Any choice between two bounds is optimal. This is the largest: the range to its
                # left then needs r - 1 repetitions, and the short first block is advanced r times.
                right = comb(s + r - 2, s - 1)
                length = min(comb(s + r - 1, s), stop - start - right)
                waiting.append((start, start + length, s, r - 1))
                start += length
                yield Action(Do.ADVANCE, start)
                r -= (
                    stop - start <= right
                )  # the right part may need as many repetitions, or one less
                s -= 1
                kept = stop - start > 1  # a single block is taped at once
                if kept:
                    yield Action(Do.KEEP, start)
            yield Action(Do.TAPE, start)
            if kept:
                yield Action(Do.DROP, start)
            if not waiting:
                return
            start, stop, s, r = waiting.pop()
            yield Action(Do.LOAD, start)
