"""Multipliers by autograd through the stored trajectory."""

from dataclasses import dataclass
from typing import final

from bilevel import autodiff, tree
from bilevel.dynamics.per_step import GradientSum
from bilevel.dynamics.steps import walk
from bilevel.methods.base import Found, HypergradientMethod, Instance
from bilevel.tree import Tree


@final
@dataclass(frozen=True)
class Unrolled(HypergradientMethod):
    """Exact for the k-step inner solution; the graph of all k steps is in memory at once."""

    def find(self, instance: Instance) -> Found:  # noqa: D102
        dynamics = instance.dynamics
        control, start = autodiff.variables((instance.control, instance.observation))
        with autodiff.recording():
            state: Tree = None
            for made, state in enumerate(walk(dynamics, start, control, instance.horizon)):
                if not made:
                    autodiff.refuse_hidden(state, (start, control), "start")
            instance.check_finite(tree.detach(state))
            outer = instance.outer_gradient(dynamics.readout(state))
            through = autodiff.pull(dynamics.readout(state), outer.in_params, control)
        gradient = GradientSum(control)
        gradient.add(control, outer.in_control)
        gradient.add(control, through)
        warm = instance.reached(state, instance.horizon)
        return Found(outer.value, gradient.total(), warm, outer)
