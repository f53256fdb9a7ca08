"""One step of a dynamics, checked; and the loop over all of them."""

import math
from collections.abc import Callable, Iterator
from operator import is_

from torch import Tensor

from bilevel import tree
from bilevel.dynamics.dynamics import Dynamics
from bilevel.dynamics.per_step import initial_control, step_control
from bilevel.errors import ArgumentError
from bilevel.tree import Tree

Step = Callable[[Tree, Tree, int], Tree]


def walk(dynamics: Dynamics, observation: Tree, control: Tree, horizon: int) -> Iterator[Tree]:
    """u(0), u(1), ..., u(T), each when it is asked for."""
    state = begun(dynamics, observation, control)
    yield state
    for t in range(1, horizon + 1):
        state = stepped(dynamics.step, state, control, t)
        yield state


def begun(dynamics: Dynamics, observation: Tree, control: Tree) -> Tree:
    """u(0) = g0(f; theta_0)."""
    state = dynamics.init(observation, initial_control(control))
    tree.check_leaves(state, "u(0)")
    return state


def stepped(step: Step, state: Tree, control: Tree, t: int) -> Tree:
    """u(t) = g(u(t-1), theta_t), refused where it is not like u(t-1), or u(t-1) was written to."""
    written = watch(state)
    following = step(state, step_control(control, t), t)
    if not tree.alike(following, state):
        source = f"step {t} must return a state like its own"
        tree.check_like(following, state, f"u({t})", source)
    if written():
        raise ArgumentError(
            f"step {t} writes to its state in place, but the sweep still needs that state: "
            "let the step return new tensors, or begin it with state.clone()."
        )
    return following


def first_infinite(
    dynamics: Dynamics, observation: Tree, control: Tree, horizon: int
) -> int | None:
    """The first t at which u(t) is not finite; None if every state is."""
    states = enumerate(walk(dynamics, observation, control, horizon))
    return next((t for t, state in states if not math.isfinite(tree.norm(state))), None)


def watch(values: Tree) -> Callable[[], bool]:
    """Tells, when called, whether a tensor was written to since, or another put in its place."""
    if isinstance(values, Tensor):
        version = values._version
        return lambda: values._version != version
    leaves = tree.leaves_of(values)
    versions = [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]

    def written() -> bool:
        now = tree.leaves_of(values)
        if len(now) != len(leaves) or not all(map(is_, now, leaves)):
            return True
        return versions != [leaf._version for leaf in now if isinstance(leaf, Tensor)]

    return written
