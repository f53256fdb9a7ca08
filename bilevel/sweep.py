"""Executes a schedule: the forward sweep (6a, 6b) and the taping of its blocks in reverse order.

Nothing here knows costs or multipliers; `lagrangian` does. A *taped* step ran on variable trees, so
that its graph can be pulled back; one block's graph lives at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.checkpointing import Checkpointing
from bilevel.dynamics import Dynamics, initial_control, step_control
from bilevel.errors import BilevelError
from bilevel.randomness import RandomState
from bilevel.tree import Tree


class DeterminismError(BilevelError, RuntimeError):
    """A step gave two results for the same state, control, t and random state."""


@dataclass(frozen=True)
class Block:
    """Steps `steps.start + 1 .. steps.stop`, taped as one connected graph.

    Attributes:
        steps: `range(a, b)`: from u(a) to u(b).
        states: u(a), ..., u(b); u(a) is a variable tree, the others were computed from it.
    """

    steps: range
    states: list[Tree]


@dataclass
class Trajectory:
    """What the forward sweep left behind.

    Attributes:
        dynamics: g and g0.
        horizon: number of steps, T.
        observation: variable tree, f.
        control: variable tree, Theta.
        checkpointing: what is kept.
        starts: detached state at the start of each block.
        final: detached u(T).
        forward_steps: steps evaluated so far.
        random_starts: random state at the start of each block, if any step drew numbers.
        random_init: random state before `Dynamics.init`.
        initial_tape: u(0) with the graph of g0, if graphs are kept.
        last_tape: the last block, if it was taped on the way forward.
    """

    dynamics: Dynamics
    horizon: int
    observation: Tree
    control: Tree
    checkpointing: Checkpointing
    starts: list[Tree] = field(default_factory=list)
    final: Tree = None
    forward_steps: int = 0
    random_init: RandomState | None = None
    random_starts: list[RandomState] = field(default_factory=list)
    initial_tape: Tree = None
    last_tape: Block | None = None
