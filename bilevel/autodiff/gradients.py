"""Values and gradients of functions of trees, pullbacks and pushforwards."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from bilevel import shards, tree
from bilevel.autodiff.graphs import (
    autocast_as,
    autocasts,
    forget_casts,
    is_taped,
    recording,
    refuse_hidden,
    told_apart,
    variables,
)
from bilevel.autodiff.junctions import crosses, pulled, slopes_only
from bilevel.autodiff.second import compare_second
from bilevel.checks import check_scalar
from bilevel.errors import LostGradientError
from bilevel.tree import Tree


def grad(
    outputs: Sequence[Tensor],
    values: Tree,
    cotangents: Sequence[Tensor] | None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
    batched: bool = False,
) -> Tree:
    """`torch.autograd.grad` on a tree: select what requires grad, differentiate, put back.

    Args:
        outputs: tensors that require grad; none gives no gradient.
        values: the tree to differentiate in.
        cotangents: one an output; None for a scalar.
        create_graph: attach the result, so that it can be differentiated once more.
        retain_graph: keep the graph; None is `create_graph`.
        batched: whether the cotangents have a leading axis, which the gradients then have too.

    Returns:
        The tree of gradients; None where a leaf requires no grad, or no output depends on it.
    """
    leaves, structure = tree.flatten(values)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
    found: list[Tensor | None] = [None] * len(leaves)
    if outputs and places:
        wanted = [leaves[i] for i in places]
        how = {"retain_graph": retain_graph, "create_graph": create_graph, "batched": batched}
        if autocasts():
            # A backward runs in the dtypes of its forward: autocast would cast once more.
            with autocast_as([]):
                gradients = pulled(outputs, wanted, cotangents, **how)
            if not create_graph:
                forget_casts()
        else:
            gradients = pulled(outputs, wanted, cotangents, **how)
        for i, gradient in zip(places, gradients, strict=True):
            # As those of an embedding with sparse=True: sums and norms are of dense vectors.
            if gradient is not None and gradient.layout != torch.strided:
                gradient = gradient.to_dense()
            found[i] = shards.fitted(gradient, leaves[i])
    return tree.unflatten(structure, found)


def pull(outputs: Tree, cotangent: Tree, inputs: Tree, *, keep: bool = False) -> Tree:
    """Adjoint of the derivative of `outputs` in `inputs`, applied to `cotangent`; frees the graph.

    Args:
        outputs: computed from `inputs` with grad enabled.
        cotangent: a vector of the space of `outputs`.
        inputs: variable trees, or trees computed on the way to `outputs`.
        keep: keep the graph, and attach the result, so that it can be pulled back once more.

    Returns:
        A vector of the space of `inputs`; None also where `outputs` do not depend on the leaf.
    """
    pairs = [
        (y, v)
        for y, v in zip(tree.leaves_of(outputs), tree.leaves_of(cotangent), strict=True)
        if v is not None and y.requires_grad
    ]
    return grad([y for y, _ in pairs], inputs, [v for _, v in pairs], create_graph=keep)


def pull_each(outputs: Tree, cotangents: Tree, inputs: Tree) -> Tree:
    """`pull` of many cotangents, stacked on a first axis, as the results are; keeps the graph.

    Args:
        outputs: computed from `inputs` with grad enabled.
        cotangents: like `outputs`, each leaf with a first axis more; None where all are zero.
        inputs: as in `pull`.

    Returns:
        Vectors of the space of `inputs`, stacked; None where `outputs` do not depend on the leaf.

    Raises:
        RuntimeError: as torch raises it where processes meet on the way.
    """
    pairs = [
        (y, v)
        for y, v in zip(tree.leaves_of(outputs), tree.leaves_of(cotangents), strict=True)
        if v is not None and y.requires_grad
    ]
    ys, vs = [y for y, _ in pairs], [v for _, v in pairs]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels that are looped over inside
            return grad(ys, inputs, vs, retain_graph=True, batched=True)
    except RuntimeError:  # a kernel that refuses several: one pass for each
        if crosses(ys, [x for x in tree.leaves_of(inputs) if isinstance(x, Tensor)]):
            raise  # processes meet in the same order: nothing is tried again
    rows = zip(*(v.unbind(0) for v in vs), strict=True)
    each = [grad(ys, inputs, list(row), retain_graph=True) for row in rows]
    return tree.map_leaves(lambda *xs: None if xs[0] is None else torch.stack(xs), *each)


def value_and_gradient(
    function: Callable[..., Tensor], *arguments: Tree, name: str
) -> tuple[Tensor, tuple[Tree, ...]]:
    """Value of a real scalar `function`, and its gradient in each argument."""
    inputs = tuple(variables(argument) for argument in arguments)
    with recording():
        value = check_scalar(function(*inputs), name)
        refuse_hidden(value, inputs, name)
        return value.detach(), pull(value, torch.ones_like(value), inputs)


def gradient(
    function: Callable[[Tree, Tree], Tensor],
    params: Tree,
    control: Tree,
    *,
    name: str,
    check: bool = False,
) -> Tree:
    """Gradient of `function(params, control)` in `params`; a function of both arguments.

    Where an argument requires grad the gradient is attached to its graph, so that it can be
    differentiated once more; else no graph is left.

    Args:
        function: real scalar.
        params: tree whose variables are differentiated.
        control: tree.
        name: what to call `function` in an error.
        check: look for tensors closed over, and whether anything in `params` is read.

    Returns:
        A vector of the space of `params`, zero where `function` does not depend on the leaf.

    Raises:
        StructureError: if the value is no real scalar.
        LostGradientError: if asked to check, and a gradient would be lost.
    """
    attached = torch.is_grad_enabled() and (is_taped(params) or is_taped(control))
    with recording():
        point = _point(params, attached=attached)
        with slopes_only():
            value = check_scalar(function(point, control), name)
        if check:
            given = ((params, control) if attached else (), point)
            if own := refuse_hidden(value, given, name, twice=attached):
                compare_second(function, (params, control), own, f"the {name}", first=True)
        found = grad([value] if value.requires_grad else [], point, None, create_graph=attached)
        if check and all(g is None for g in tree.leaves_of(found)):
            raise LostGradientError(
                f"the {name} does not depend on the params, so that nothing would be minimised: "
                "use them, and look for a detach() or a no_grad() inside."
            )
        return tree.filled(found, point)


def _point(params: Tree, *, attached: bool) -> Tree:
    """`params` as tensors that a gradient can be taken in, each in one place only."""
    if isinstance(params, Tensor):
        return (
            params if attached and params.requires_grad else tree.detached(params).requires_grad_()
        )
    seen: list[Tensor] = []

    def own(x: Any) -> Any:
        if not tree.is_variable(x):
            return tree.detached(x) if isinstance(x, Tensor) else x
        if not (attached and x.requires_grad):
            return tree.detached(x).requires_grad_()
        # A tensor in two places would collect the gradients of both.
        twice = any(x is y for y in seen)
        seen.append(x)
        return x.view_as(x) if twice else x

    return tree.map_leaves(own, params)


def slopes(outputs: Sequence[Tensor], values: Tree) -> tuple[list[Tensor], Tree]:
    """The pullback of `outputs` as a function of its cotangents, which are leaves of the graph."""
    # Its derivative in a cotangent is the pushforward: that is linear, so that reverse derivatives
    # of what computed `outputs` are all it needs.
    cotangents = [torch.zeros_like(y, requires_grad=True) for y in outputs]
    return cotangents, grad(outputs, values, cotangents, create_graph=True)


def tangents(
    cotangents: list[Tensor], pulled: Tree, directions: Tree, *, retain_graph: bool
) -> list[Tensor | None]:
    """The derivative along directions of what `slopes` pulled back."""
    # What the pullback does not depend on, as behind a sign or a rounding, does not move.
    pairs = [
        (p, d)
        for p, d in zip(tree.leaves_of(pulled), tree.leaves_of(directions), strict=True)
        if p is not None and d is not None and p.requires_grad
    ]
    if not pairs:
        return [None] * len(cotangents)
    ps, ds = zip(*pairs, strict=True)
    return grad(ps, cotangents, ds, retain_graph=retain_graph)


def pushforward(
    function: Callable[..., Tree], arguments: tuple[Tree, ...], directions: tuple[Tree, ...]
) -> tuple[Tree, Tree]:
    """Value of `function`, and its derivative in its arguments along `directions`.

    The derivative is detached on purpose: third derivatives of some kernels of torch (batch
    normalisation) are wrong in silence.

    Args:
        function: of trees.
        arguments: where; attached ones keep the outputs attached.
        directions: vectors of the spaces of the arguments; None in them stands for zero.

    Returns:
        The value, detached if every argument is; and a vector of its space, detached.

    Raises:
        LostGradientError: if nothing is attached and the value is nevertheless.
    """
    attached = is_taped(arguments)
    with recording():
        inputs = told_apart(arguments, set())
        value = function(*inputs)
        if not attached and (own := refuse_hidden(value, inputs, "the function", twice=True)):
            compare_second(function, arguments, own, "a step")
        outputs = [y for y in tree.leaves_of(value) if isinstance(y, Tensor) and y.requires_grad]
        along = zip(tree.leaves_of(inputs), tree.leaves_of(tree.detach(directions)), strict=True)
        moved = [(x, d) for x, d in along if tree.is_variable(x) and d is not None]
        xs, ds = [x for x, _ in moved], [d for _, d in moved]
        found = tangents(*slopes(outputs, xs), ds, retain_graph=attached)
        return value if attached else tree.detach(value), spread(found, value)


def spread(found: list[Tensor | None], outputs: Tree) -> Tree:
    """Tangents of the outputs that require grad, in their places; zero for other variables."""
    each = iter(found)

    def at(y: Any) -> Tensor | None:
        if not tree.is_variable(y):
            return None
        tangent = next(each) if y.requires_grad else None
        return torch.zeros_like(y) if tangent is None else tangent

    return tree.map_leaves(at, outputs)


def rows(outputs: Tensor, inputs: Tensor, *, keep: bool = False) -> Tensor:
    """Jacobians of many small functions at once, whose graph is one.

    Args:
        outputs: shape ``(N, k)``; row i is computed from row i of `inputs` alone.
        inputs: shape ``(N, d)``.
        keep: keep the graph, for further derivatives.

    Returns:
        Shape ``(N, k, d)``, detached; zero where nothing depends on the inputs.
    """
    found = inputs.new_empty(*outputs.shape, inputs.shape[1])
    write_rows(outputs, [inputs], [found], keep=keep)
    return found


def write_rows(
    outputs: Tensor, inputs: Sequence[Tensor], places: Sequence[Tensor], *, keep: bool = False
) -> None:
    """`rows` in several inputs, each written where it belongs.

    Args:
        outputs: as in `rows`.
        inputs: each of shape ``(N, d)``, with a `d` of its own.
        places: what to write to, ``(..., k, d)`` with N entries of the axes before.
        keep: as in `rows`.
    """
    n, k = outputs.shape
    if not outputs.requires_grad or not outputs.numel():
        for place in places:
            place.zero_()
        return
    both = [(x, place) for x, place in zip(inputs, places, strict=True) if x.numel()]
    inputs, places = [x for x, _ in both], [place for _, place in both]
    if not both:
        return
    units = torch.eye(k, dtype=outputs.dtype, device=outputs.device)
    # All rows in one pass where calls cost more than arithmetic, and memory is no matter.
    if n * k * sum(x.shape[1] for x in inputs) <= SMALL:
        with suppress(RuntimeError):  # as of a backward that torch cannot map
            _all_rows(outputs, inputs, units[:, None].expand(k, n, k), places)
            return
    for i, unit in enumerate(units):
        again = keep or i < k - 1
        found = grad([outputs], [*inputs], [unit.expand(n, k)], retain_graph=again)
        for place, row in zip(places, found, strict=True):
            there = place[..., i, :]
            there.copy_(there.new_zeros(()) if row is None else row.reshape(there.shape))


SMALL = 40_000  # numbers of a Jacobian


def _all_rows(
    outputs: Tensor, inputs: Sequence[Tensor], units: Tensor, places: Sequence[Tensor]
) -> None:
    each = torch.autograd.grad(
        outputs, [*inputs], units, retain_graph=True, allow_unused=True, is_grads_batched=True
    )
    for place, found in zip(places, each, strict=True):
        if found is None:
            place.zero_()
        else:
            place.copy_(found.transpose(0, 1).reshape(place.shape))
