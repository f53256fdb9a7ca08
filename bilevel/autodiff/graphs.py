"""What has a graph, and whether the graph reaches only what it should."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable as once_differentiable_of_torch
from torch.autograd.graph import Node

from bilevel import tree
from bilevel.autodiff.junctions import behind
from bilevel.errors import LostGradientError, UnsupportedError
from bilevel.tree import Tree

_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


class _Inside(threading.local):
    def __init__(self) -> None:
        self.sweep = False  # whether this thread is in one


_inside = _Inside()


class recording:  # noqa: N801 - a context, as torch.enable_grad is
    """Grad mode on, whatever the caller's mode: a sweep differentiates by itself."""

    # A class of its own, since each small step enters one: a generator takes twice as long.

    def __enter__(self) -> None:
        if torch.is_inference_mode_enabled():
            raise UnsupportedError(
                "gradients were asked for inside torch.inference_mode(), where nothing is "
                "recorded: call it outside, or take torch.no_grad(), inside which they are right."
            )
        self._outside = _inside.sweep
        self._recorded = torch.is_grad_enabled()
        _inside.sweep = True
        if not self._recorded:
            torch.set_grad_enabled(True)

    def __exit__(self, *_: object) -> None:
        _inside.sweep = self._outside
        if not self._recorded:
            torch.set_grad_enabled(False)


def refuse_inside(
    name: str, *arguments: Tree, instead: str = "bilevel.rollout or bilevel.total_cost"
) -> None:
    """Refuse what a step or an objective calls, and what returns values without a graph."""
    if _inside.sweep and is_taped(arguments):
        raise LostGradientError(
            f"{name} was called inside a step or an objective with arguments that require grad, "
            "but what it returns has no graph, so that its part of the gradient would be lost: use "
            f"{instead} there, or detach the arguments."
        )


class Cast(NamedTuple):
    """What autocast does on a device: to which dtype, and whether it keeps its copies."""

    device: str
    dtype: torch.dtype
    cache: bool


def autocasts() -> list[Cast]:
    """Where autocast is on."""
    if not any(map(torch.is_autocast_enabled, _AUTOCAST_DEVICES)):
        return []
    on = [d for d in _AUTOCAST_DEVICES if torch.is_autocast_enabled(d)]
    return [Cast(d, torch.get_autocast_dtype(d), torch.is_autocast_cache_enabled()) for d in on]


@contextmanager
def autocast_as(wanted: list[Cast]) -> Iterator[None]:
    """Autocast on where `wanted`, off elsewhere."""
    with ExitStack() as stack:
        for device in {cast.device for cast in autocasts()} - {cast.device for cast in wanted}:
            stack.enter_context(torch.autocast(device, enabled=False))
        for device, dtype, cache in wanted:
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=cache))
        yield


def forget_casts() -> None:
    """Autocast keeps a copy of each leaf that it cast until its context ends; let go of them."""
    if autocasts():
        torch.clear_autocast_cache()


def paused() -> torch.no_grad:
    """Grad mode off: arithmetic on vectors leaves no graph."""
    return torch.no_grad()


def is_on() -> bool:
    """Whether the caller records graphs."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def is_taped(values: Tree) -> bool:
    """Whether what is computed from `values` leaves a graph."""
    if isinstance(values, Tensor):
        return values.requires_grad
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree.leaves_of(values))


def variables(values: Tree) -> Tree:
    """`values` detached, sharing memory, its variables requiring grad."""
    return tree.map_leaves(_variable, values)


def _variable(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    alias = tree.detached(leaf)
    return alias.requires_grad_() if tree.is_variable(leaf) else alias


def told_apart(values: Tree, known: set[int]) -> Tree:
    """`values`, each variable a tensor of its own that requires grad.

    Args:
        values: a tree.
        known: ids of the tensors of earlier results, which are alive; those of this one are added.

    Returns:
        The same values.
    """
    # Autograd knows a state by its tensors. One that a step passes through unchanged, returns
    # twice, or computes another from, would collect the multipliers of more than its place; a
    # constant would get none. A single one that was computed now is one of its own already.
    alone = isinstance(values, Tensor) and values.grad_fn is not None and id(values) not in known

    def apart(leaf: Any) -> Any:
        if not alone and tree.is_variable(leaf):
            computed = leaf.requires_grad
            leaf = leaf.view_as(leaf) if computed else leaf.detach().requires_grad_()
        known.add(id(leaf))
        return leaf

    return tree.map_leaves(apart, values)


def refuse_hidden(
    outputs: Tree,
    inputs: Tree,
    name: str,
    *,
    twice: bool = False,
    remedy: str = "Pass it in the control",
) -> set[type]:
    """Refuse `outputs` whose graph reaches a tensor that is not among `inputs`.

    Args:
        outputs: computed from the inputs.
        inputs: trees.
        name: of what computed them.
        twice: whether they are differentiated twice.
        remedy: what to do about such a tensor.

    Returns:
        The functions with a backward of the user's own that were met, where that is asked for
        twice.

    Raises:
        LostGradientError: if there is one.
        UnsupportedError: if there is no second derivative.
    """
    # With `inputs` empty this is one look at `requires_grad`: nothing then should have a graph.
    own: set[type] = set()
    if isinstance(outputs, Tensor) and not outputs.requires_grad:
        return own
    tensors = [y for y in tree.leaves_of(outputs) if isinstance(y, Tensor) and y.requires_grad]
    if not tensors:
        return own
    given = [x for x in tree.leaves_of(inputs) if isinstance(x, Tensor)]
    known, nodes = {id(x) for x in given}, {x.grad_fn for x in given}
    for leaf in _graph_leaves(tensors, known, nodes, name if twice else "", own):
        if not getattr(leaf, "passing", False):
            raise LostGradientError(
                f"{name} uses a tensor of shape {tuple(leaf.shape)} that requires grad but is not "
                f"among its arguments; its gradient would be lost. {remedy}, or "
                "freeze it with requires_grad_(False)."
            )
    return own


def once_differentiable(name: str, function: str) -> UnsupportedError:
    """The error for a second derivative that a function of the user's does not have."""
    return UnsupportedError(
        f"{name} needs a second derivative of {function}, whose backward is marked with "
        "once_differentiable, so that terms would be lost: write its backward in differentiable "
        "operations, without the mark, or take a method that differentiates once."
    )


def compiled(name: str) -> UnsupportedError:
    """The error for a second derivative that torch.compile does not make."""
    return UnsupportedError(
        f"{name} needs a second derivative of a function of torch.compile, which makes first ones "
        "alone: give it uncompiled, or take a method that differentiates once; a step of a "
        "dynamics may be compiled by bilevel.Compiled."
    )


# How torch names the nodes of a compiled function, and of its gradient.
_COMPILED, _COMPILED_TWICE = "CompiledFunctionBackward", "CompiledFunctionBackwardBackward"


def _refuse_once(node: Node, name: str, own: set[type]) -> None:
    function = getattr(type(node), "_forward_cls", None)
    if function is None:
        return
    code = getattr(getattr(function, "backward", None), "__code__", None)
    if code is _MARK:
        raise once_differentiable(name, function.__name__)
    if not function.__module__.startswith(("torch.", "bilevel.")):
        own.add(function)


_MARK: Any = getattr(once_differentiable_of_torch(print), "__code__", None)


def _graph_leaves(
    tensors: Sequence[Tensor],
    known: set[int],
    seen: set[Node | None],
    twice: str,
    own: set[type],
) -> Iterator[Tensor]:
    """The tensors that accumulate a gradient in the graph behind `tensors`."""
    # Nobody looks behind known tensors, which are not among them, and behind nodes that were seen.
    # `twice` names what is differentiated twice, if it is. No function inside of this one: what it
    # closes over, the graph, would live until the next garbage collection.
    pending: list[Node | Tensor] = [*tensors]
    while pending:
        one = pending.pop()
        if isinstance(one, Tensor):
            node = one.grad_fn
            if node is None and id(one) not in known:
                known.add(id(one))
                further = behind(one)  # the graph before a junction
                pending += further
                if not further:
                    yield one
            elif node is not None and node not in seen:
                seen.add(node)
                pending.append(node)
            continue
        if twice:
            _refuse_once(one, twice, own)
        kind = one.name()
        if kind == _COMPILED_TWICE or (twice and kind == _COMPILED):
            raise compiled(twice or "this graph")
        if kind.endswith("Error"):  # what the mark leaves where a graph is asked for
            raise once_differentiable("this graph", "a function")
        edges = one.next_functions
        if not edges:
            # Only a node that accumulates a gradient has a `variable`.
            variable = getattr(one, "variable", None)
            if isinstance(variable, Tensor):
                pending.append(variable)
        for previous, _ in edges:
            if previous is not None and previous not in seen:
                seen.add(previous)
                pending.append(previous)
