"""The checkpointings that a budget allows, found once for each kind of problem."""

from typing import Any

from torch import Tensor

from bilevel import tree
from bilevel.dynamics.problem import ControlProblem
from bilevel.sweeps.checkpointing import Budget, Checkpointing
from bilevel.sweeps.sweep import planned
from bilevel.tree import Tree


class Plans:
    """What was asked for, resolved for the problem at hand.

    Measuring a step costs about a sweep. Problems whose horizon, observation and control agree in
    structure, shape, dtype and device are of one kind, and measured once.
    """

    def __init__(self, checkpointing: Checkpointing | Budget | None) -> None:
        """Take it as the user gave it."""
        self._given = checkpointing
        self._found: dict[Any, Checkpointing] = {}

    def of(self, problem: ControlProblem, observation: Tree, control: Tree) -> Checkpointing:
        """The checkpointing of a problem.

        Args:
            problem: dynamics, horizon and costs.
            observation: f.
            control: Theta.

        Returns:
            The checkpointing.

        Raises:
            ArgumentError: if what was given is none, or the budget is too small.
        """
        leaves, structure = tree.flatten((observation, control))
        kind = problem.horizon, structure, tuple(_kind(leaf) for leaf in leaves)
        if kind not in self._found:
            self._found[kind] = planned(self._given, problem, observation, control)
        return self._found[kind]


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else type(leaf)
