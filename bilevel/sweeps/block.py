"""Steps in a row, taped: what a sweep pulls back at once."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from bilevel import autodiff, tree
from bilevel.errors import LostGradientError
from bilevel.tree import Tree

Costs = Callable[[Tree, Tree, int], list[Tensor]]  # of u(t-1), of what step t receives, and of t


def no_costs(state: Tree, theta: Tree, t: int) -> list[Tensor]:  # noqa: ARG001
    """Where no cost is asked for on the way."""
    return []


@dataclass(frozen=True)
class Block:
    """Steps a+1..b, taped as one connected graph.

    Attributes:
        steps: `range(a, b)`.
        states: u(a), ..., u(b); u(a) is a variable tree, the others were computed from it, and
            u(b) is as the step returned it.
        controls: theta_{a+1}, ..., theta_b, parts of the variable tree of the control.
        costs: what was evaluated before each step, in one list.
    """

    steps: range
    states: list[Tree]
    controls: list[Tree]
    costs: list[Tensor]

    @property
    def end(self) -> Tree:
        """u(b)."""
        return self.states[-1]

    @property
    def times(self) -> range:
        """The t of its steps, a+1, ..., b."""
        return range(self.steps.start + 1, self.steps.stop + 1)


def refuse_hidden(block: Block, controls: list[Tensor]) -> None:
    """Refuse steps that close over a tensor that requires grad; `controls` are all leaves given."""
    # What a step did not compute was made a leaf of its own, when it was told apart.
    states = block.states
    own = [
        x
        for state in states[1:-1]
        for x in tree.leaves_of(state)
        if isinstance(x, Tensor) and x.grad_fn is None
    ]
    try:
        autodiff.refuse_hidden(states[1:], (states[0], own, controls), "the dynamics")
    except LostGradientError:  # one walk over all is quick; which step it was is asked rarely
        for t, (state, following) in zip(block.times, pairwise(states), strict=True):
            autodiff.refuse_hidden(following, (state, own, controls), f"step {t} of the dynamics")
        raise
