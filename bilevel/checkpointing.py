"""What a sweep keeps of the forward trajectory: pure integers, no tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

from bilevel.errors import ArgumentError, UnsupportedError


@dataclass(frozen=True)
class Checkpointing:
    """How many states the forward sweep keeps, and how many steps are taped at a time.

    The multiplier sweep walks backwards over blocks of steps. It tapes one block (runs it again
    from the state at its start, recording the graph), reverses it, and frees it.

    Attributes:
        snapshots: states kept at most; None keeps the state at the start of every block.
        block: steps in a block; None makes the whole horizon one block, so that the graphs of
            the forward sweep are kept and nothing is computed twice.

    Raises:
        ArgumentError: if `snapshots` or `block` is less than 1.
        UnsupportedError: for a schedule other than `Checkpointing()` and
            `Checkpointing(block=None)`.
    """

    snapshots: int | None = None
    block: int | None = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("snapshots", "block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"{name} must be at least 1, or None, got {value}.")
        if self.snapshots is not None or self.block not in (1, None):
            raise UnsupportedError(
                f"{self} is a schedule this version does not have; use Checkpointing(), which "
                "keeps every state, or Checkpointing(block=None), which keeps every graph."
            )

    @property
    def keeps_graphs(self) -> bool:
        """Whether the forward sweep records the graph that the multiplier sweep reverses."""
        return self.block is None

    def blocks(self, horizon: int) -> Sequence[range]:
        """Steps of each block, in time order: `range(a, b)` leads from u(a) to u(b).

        Args:
            horizon: number of steps, T.

        Returns:
            The blocks; none for `horizon` 0.

        Example:
            >>> list(Checkpointing().blocks(3))
            [range(0, 1), range(1, 2), range(2, 3)]
            >>> Checkpointing(block=None).blocks(3)
            [range(0, 3)]
        """
        if not horizon:
            return []
        length = horizon if self.block is None else self.block
        return [range(a, min(a + length, horizon)) for a in range(0, horizon, length)]
