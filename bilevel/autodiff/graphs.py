"""What has a graph, and whether the graph reaches only what it should."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from bilevel import tree
from bilevel.errors import LostGradientError
from bilevel.tree import Tree


def recording() -> torch.enable_grad:
    """Grad mode on, whatever the caller's mode: a sweep differentiates by itself."""
    return torch.enable_grad()


def paused() -> torch.no_grad:
    """Grad mode off: arithmetic on vectors leaves no graph."""
    return torch.no_grad()


def is_taped(values: Tree) -> bool:
    """Whether what is computed from `values` leaves a graph."""
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree.leaves_of(values))


def variables(values: Tree) -> Tree:
    """`values` detached, sharing memory, its variables requiring grad."""
    return tree.map_leaves(_variable, values)


def _variable(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    alias = leaf.detach()
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


def refuse_hidden(outputs: Tree, inputs: Tree, name: str) -> None:
    """Refuse `outputs` whose graph reaches a tensor that is not among `inputs`."""
    # With `inputs` empty this is one look at `requires_grad`: nothing then should have a graph.
    if isinstance(outputs, Tensor) and not outputs.requires_grad:
        return
    tensors = [y for y in tree.leaves_of(outputs) if isinstance(y, Tensor) and y.requires_grad]
    if not tensors:
        return
    given = [x for x in tree.leaves_of(inputs) if isinstance(x, Tensor)]
    known, behind = {id(x) for x in given}, {x.grad_fn for x in given}
    for leaf in _graph_leaves(tensors, behind):
        if id(leaf) not in known:
            raise LostGradientError(
                f"{name} uses a tensor of shape {tuple(leaf.shape)} that requires grad but is not "
                "among its arguments; its gradient would be lost. Pass it in the control, or "
                "freeze it with requires_grad_(False)."
            )


def _graph_leaves(tensors: Sequence[Tensor], seen: set[Node | None]) -> Iterator[Tensor]:
    """The tensors that accumulate a gradient in the graph behind `tensors`, not behind `seen`."""
    pending: list[Node] = []
    for tensor in tensors:
        node = tensor.grad_fn
        if node is None:
            yield tensor
        elif node not in seen:
            seen.add(node)
            pending.append(node)
    while pending:
        node = pending.pop()
        edges = node.next_functions
        if not edges:
            # Only a node that accumulates a gradient has a `variable`.
            variable = getattr(node, "variable", None)
            if isinstance(variable, Tensor):
                yield variable
        for previous, _ in edges:
            if previous is not None and previous not in seen:
                seen.add(previous)
                pending.append(previous)
