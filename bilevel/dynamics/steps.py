"""One step of a dynamics, checked; and the loop over all of them."""

import math
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any

from torch import Tensor

from bilevel import autodiff, tree
from bilevel.dynamics.dynamics import Dynamics
from bilevel.dynamics.per_step import initial_control, step_control
from bilevel.errors import ArgumentError, StructureError
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
    # The sweep owns its states: a step or a caller that writes to one must not reach the arguments.
    own, received = tree.copied(observation), _lent(initial_control(control))
    written = watch((own, received))
    try:
        state = dynamics.init(own, received)
    except RuntimeError as error:
        _name_devices(error, (observation, control), "dynamics.init")
        raise
    if written():
        raise ArgumentError(
            "the dynamics writes to its observation or its control in place: clone them first."
        )
    tree.check_leaves(state, "u(0)")
    return tree.copied(state, only=received)


def stepped(step: Step, state: Tree, control: Tree, t: int) -> Tree:
    """u(t) = g(u(t-1), theta_t); refused if not like u(t-1), or if arguments were written to."""
    received = step_control(control, t)
    if t == 1:
        received = _lent(received)
    written, theirs = watch(state), watch(received)
    try:
        following = step(state, received, t)
    except RuntimeError as error:
        _name_devices(error, (state, control), f"step {t}")
        if "leaf Variable that requires grad is being used in an in-place" not in str(error):
            raise
        raise ArgumentError(
            f"step {t} writes to its arguments in place: let it return new tensors."
        ) from error
    if not tree.alike(following, state):
        source = f"step {t} must return a state like its own"
        tree.check_like(following, state, f"u({t})", source)
    if written():
        raise ArgumentError(
            f"step {t} writes to its state in place, but the sweep still needs that state: "
            "let the step return new tensors, or begin it with state.clone()."
        )
    if theirs():
        raise ArgumentError(
            f"step {t} writes to its control in place: let it make new tensors, and put what "
            "evolves into the state."
        )
    return following


def _lent(received: Tree) -> Tree:
    """A part of the control, as a copy where nothing else keeps a function from writing to it."""
    # In-place writes to what requires grad are refused by torch, before they are made. So the first
    # evaluation tells, and the caller's control is whole.
    guarded = autodiff.is_on() and autodiff.is_taped(received)
    return received if guarded else tree.copied(received)


def _name_devices(error: RuntimeError, arguments: Tree, name: str) -> None:
    """Say on which devices the arguments are, if they are on several and that failed."""
    devices = sorted({str(x.device) for x in tree.leaves_of(arguments) if isinstance(x, Tensor)})
    if len(devices) > 1 and "device" in str(error):
        raise StructureError(
            f"{name} needs its state and its control on one device, got tensors on "
            f"{' and '.join(devices)}: move them before, by .to(device)."
        ) from error


def first_infinite(
    dynamics: Dynamics, observation: Tree, control: Tree, horizon: int
) -> int | None:
    """The first t at which u(t) is not finite; None if every state is."""
    states = enumerate(walk(dynamics, observation, control, horizon))
    return next((t for t, state in states if not math.isfinite(tree.norm(state))), None)


def watch(values: Tree) -> Callable[[], bool]:
    """Tells, when called, whether a tensor was written to since, or another put in its place."""
    if isinstance(values, Tensor) and not values.is_inference():  # the common case of small steps
        version = values._version
        return lambda: version != values._version
    leaves = tree.leaves_of(values)
    versions = [*map(_version, leaves)]

    def written() -> bool:
        now = tree.leaves_of(values)
        same = len(now) == len(leaves) and all(map(is_, now, leaves))
        return not same or versions != [*map(_version, now)]

    return written


def _version(leaf: Any) -> int | None:
    """How often a tensor was written to; torch does not count for those of inference mode."""
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else None
