"""Multipliers by autograd through the stored trajectory."""

from dataclasses import dataclass
from typing import final

from bilevel import autodiff, tree
from bilevel.dynamics.dynamics import GradientSum
from bilevel.methods.base import Found, HypergradientMethod, Instance


@final
@dataclass(frozen=True)
class Unrolled(HypergradientMethod):
    """Exact for the k-step inner solution; the graph of all k steps is in memory at once."""

    def find(self, instance: Instance) -> Found:
        """See `HypergradientMethod`."""
        dynamics = instance.dynamics
        control, start = autodiff.variables((instance.control, instance.observation))
        with autodiff.recording():
            state = first = dynamics.init(start, control)
            autodiff.refuse_hidden(state, (start, control), "start")
            for t in range(1, instance.horizon + 1):
                state = dynamics.step(state, control, t)
            instance.check_end(tree.detach(state), first)
            outer = instance.outer_gradient(dynamics.readout(state))
            through = autodiff.pull(dynamics.readout(state), outer.in_params, control)
        gradient = GradientSum(control)
        gradient.add(control, outer.in_control)
        gradient.add(control, through)
        state = tree.detach(state)
        return Found(outer.value, gradient.total(), state, instance.horizon, outer)
