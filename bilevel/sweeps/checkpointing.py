"""What a sweep keeps of the forward trajectory, and how that is chosen: integers, no tensors."""

import math
import re
from dataclasses import dataclass, field

from bilevel.checks import check_kind, check_whole, is_whole
from bilevel.errors import ArgumentError
from bilevel.sweeps.schedule import Schedule
from bilevel.sweeps.storage import IN_MEMORY, Storage

STORAGES = "InMemory(), OnHost() or OnDisk(folder)"


@dataclass(frozen=True)
class Checkpointing:
    """How many states a sweep keeps, and how many steps are taped at a time.

    The multiplier sweep walks backwards over blocks of steps. It tapes one block (runs it again
    from the state at its start, recording the graph), reverses it, and frees it. A block whose
    start was not kept is reached from the nearest snapshot before it, by the schedule with the
    fewest evaluations (`bilevel.sweeps.schedule`).

    Attributes:
        snapshots: states kept at most; None keeps the state at the start of every block.
        block: steps in a block; None makes the whole horizon one block, so that the graphs of
            the forward sweep are kept and nothing is computed twice.
        storage: where snapshots are kept.
        forward_steps: steps that `adjoint` evaluates, as predicted by `plan`; None if made by hand.
        peak_bytes: live bytes beyond the gradient, as predicted by `plan`; None if made by hand.

    Raises:
        ArgumentError: if `snapshots` or `block` is less than 1, or something is to be kept where
            graphs are kept.

    Example:
        >>> import torch, bilevel as bl
        >>> walk = bl.ControlProblem(
        ...     bl.Map(lambda x, u, t: x + u),
        ...     terminal=lambda x, control: x**2,
        ...     horizon=2,
        ...     running=lambda x, u, t: u**2,
        ... )
        >>> kept = bl.Checkpointing(block=None)  # the graph of every step
        >>> bl.adjoint(
        ...     walk, torch.tensor(1.0), torch.tensor(0.5), checkpointing=kept
        ... ).gradient
        tensor(10.)
    """

    snapshots: int | None = None
    block: int | None = 1
    storage: Storage = IN_MEMORY
    forward_steps: int | None = field(default=None, compare=False, kw_only=True)
    peak_bytes: int | None = field(default=None, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("snapshots", "block"):
            check_whole(getattr(self, name), name, 1, optional=True)
        check_kind(self.storage, Storage, "storage", STORAGES)
        if self.keeps_graphs and (self.snapshots is not None or self.storage != IN_MEMORY):
            raise ArgumentError(
                "block=None keeps every graph, so that there are no snapshots to count or to store:"
                f" leave out snapshots and storage, or give a block, got {self}."
            )

    @property
    def keeps_graphs(self) -> bool:
        """Whether the forward sweep records the graph that the multiplier sweep reverses."""
        return self.block is None

    def schedule(self, horizon: int) -> Schedule:
        """When `horizon` steps are kept, advanced and taped.

        Args:
            horizon: number of steps, T.

        Returns:
            The schedule.

        Example:
            >>> Checkpointing(snapshots=10, block=32).schedule(1000).forward_steps
            2616
        """
        block = max(horizon, 1) if self.block is None else self.block
        every = max(-(-horizon // block) - 1, 1)  # the last block is taped at once
        return Schedule(horizon, block, min(self.snapshots or every, every))


def plan(
    horizon: int,
    budget_bytes: int,
    state_bytes: int,
    graph_bytes: int,
    storage: Storage = IN_MEMORY,
    *,
    working_bytes: int | None = None,
    longest: int | None = None,
) -> Checkpointing:
    """The checkpointing with the fewest evaluations whose live bytes stay within a budget.

    At its peak a sweep holds its snapshots, the graph of one block, and what it works with: the
    final state, the multiplier, and what is passing through a step.

    Args:
        horizon: number of steps, T.
        budget_bytes: bytes allowed beyond the gradient itself.
        state_bytes: of one state.
        graph_bytes: of the graph of one step.
        storage: where snapshots are kept.
        working_bytes: needed whatever is kept; None takes three states and one step's graph.
        longest: steps in a block at most, none of which keeps its graph for later; None sets no
            bound.

    Returns:
        The checkpointing, with its predictions `forward_steps` and `peak_bytes`.

    Raises:
        ArgumentError: if the budget is too small; the message states the least that works.

    Example:
        >>> found = plan(1000, 64_000, state_bytes=1000, graph_bytes=1000)
        >>> found.snapshots, found.block, found.forward_steps, found.peak_bytes
        (29, 31, 2039, 64000)
    """
    sizes = {"horizon": horizon, "state_bytes": state_bytes, "graph_bytes": graph_bytes}
    for name, value in sizes.items():
        check_whole(value, name)
    working = 3 * state_bytes + graph_bytes if working_bytes is None else working_bytes
    resident = storage.resident
    least = working + resident(1) * state_bytes + min(horizon, 1) * graph_bytes
    if budget_bytes < least:
        raise ArgumentError(
            f"a budget of {budget_bytes} bytes is too small: one state ({state_bytes} bytes), the "
            f"graph of one step ({graph_bytes}) and what the sweep works with ({working}) need at "
            f"least {least} bytes. Raise the budget to that, or make the state smaller."
        )
    whole = working + state_bytes + horizon * graph_bytes
    if whole <= budget_bytes and longest is None:
        return Checkpointing(block=None, forward_steps=horizon, peak_bytes=whole)
    # Of all (snapshots, block) within the budget, the fewest forward steps, then the least memory.
    # For a block size the best number of snapshots is the largest that fits: only blocks are tried,
    # the longest first.
    best = (math.inf, math.inf, 1, 1)
    largest = (budget_bytes - working - resident(1) * state_bytes) // max(graph_bytes, 1)
    largest = min(largest if graph_bytes else horizon, horizon, longest or horizon)
    for block in range(largest, 0, -1):
        # Several blocks advance every step but those of the last: from here on nothing is better.
        if 2 * horizon - block > best[0]:
            break
        room = budget_bytes - working - block * graph_bytes
        snapshots = max(-(-horizon // block) - 1, 1)  # one for every block but the last
        if resident(snapshots) * state_bytes > room:
            snapshots = room // state_bytes
        peak = budget_bytes - room + resident(snapshots) * state_bytes
        forward = Schedule(horizon, block, snapshots).forward_steps
        best = min(best, (forward, peak, snapshots, block))
    forward, peak, snapshots, block = best
    return Checkpointing(
        snapshots, block, storage, forward_steps=int(forward), peak_bytes=int(peak)
    )


_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("kMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
}


@dataclass(frozen=True)
class Budget:
    """Bytes a sweep may use beyond the gradient; accepted wherever `checkpointing` is.

    One step is measured on the problem at hand, then `plan` chooses. Where snapshots are kept
    elsewhere, the budget bounds the memory that the states live in.

    Attributes:
        size: bytes as an integer, or text such as "500 MiB" or "2 GB".
        storage: where snapshots are kept.

    Raises:
        ArgumentError: if the size cannot be read.

    Example:
        >>> Budget("1.5 KiB").bytes
        1536
    """

    size: int | str
    storage: Storage = IN_MEMORY

    def __post_init__(self) -> None:
        check_kind(self.storage, Storage, "storage", STORAGES)
        if self.bytes < 1:
            raise ArgumentError(f"a budget must be at least one byte, got {self.size!r}.")

    @property
    def bytes(self) -> int:
        """The size as a number."""
        if is_whole(self.size, -math.inf):
            return int(self.size)
        found = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)\s*", str(self.size))
        if found is None or found[2] not in _UNITS:
            raise ArgumentError(
                "a budget is a number of bytes, or text with one of the units "
                f"{', '.join(u for u in _UNITS if u)}, such as '500 MiB', got {self.size!r}."
            )
        return int(float(found[1]) * _UNITS[found[2]])
