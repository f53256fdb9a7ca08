"""The only file that differentiates. Gradients are with respect to Re<., .>, as torch has them.

A *variable tree* is a detached alias of a tree whose variables require grad: what is computed from
it is a graph of its own, connected to nothing the caller holds.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from bilevel import tree
from bilevel.errors import ArgumentError, LostGradientError, StructureError, UnsupportedError
from bilevel.tree import Tree


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
    leaves, structure = tree.flatten(inputs)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
    found: list[Tensor | None] = [None] * len(leaves)
    if pairs and places:
        ys, vs = zip(*pairs, strict=True)
        xs = [leaves[i] for i in places]
        pulled = torch.autograd.grad(ys, xs, vs, create_graph=keep, allow_unused=True)
        for i, vector in zip(places, pulled, strict=True):
            found[i] = vector
    return tree.unflatten(structure, found)


def check_scalar(value: Any, name: str) -> Tensor:
    """`value` if it is a real scalar tensor.

    Args:
        value: what the objective returned.
        name: which objective.

    Returns:
        `value`.

    Raises:
        StructureError: if it is anything else.
    """
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        raise StructureError(
            f"{name} must return a real scalar tensor of shape (), got {tree.kind(value)}."
        )
    return value


def value_and_gradient(
    function: Callable[..., Tensor], *arguments: Tree, name: str
) -> tuple[Tensor, tuple[Tree, ...]]:
    """Value of a real scalar `function`, and its gradient in each argument.

    Args:
        function: of `arguments`.
        arguments: trees.
        name: what to call `function` in an error.

    Returns:
        The detached value, and one vector an argument; None where it does not depend on the leaf.
    """
    inputs = tuple(variables(argument) for argument in arguments)
    with torch.enable_grad():
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
    """Gradient of `function(params, control)` in `params`; a function of both.

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
    leaves, structure = ([params], None) if isinstance(params, Tensor) else tree.flatten(params)
    attached = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (*leaves, *tree.leaves_of(control))
    )
    known = (params, control) if attached else ()
    with torch.enable_grad():
        inputs: list[Any] = []
        for x in leaves:
            if not tree.is_variable(x):
                inputs.append(x.detach() if isinstance(x, Tensor) else x)
            elif attached and x.requires_grad:
                # A tensor in two places would collect the gradients of both.
                inputs.append(x.view_as(x) if any(x is y for y in inputs) else x)
            else:
                inputs.append(x.detach().requires_grad_())
        point = inputs[0] if structure is None else tree.unflatten(structure, inputs)
        value = check_scalar(function(point, control), name)
        if check:
            refuse_hidden(value, (known, point), name)
        wanted = inputs if structure is None else [x for x in inputs if tree.is_variable(x)]
        found: Sequence[Tensor | None] = (
            torch.autograd.grad(value, wanted, create_graph=attached, allow_unused=True)
            if value.requires_grad and wanted
            else [None] * len(wanted)
        )
        if check and all(g is None for g in found):
            raise LostGradientError(
                f"the {name} does not depend on the params, so that nothing would be minimised: "
                "use them, and look for a detach() or a no_grad() inside."
            )
        filled = [
            torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)
        ]
    if structure is None:
        return filled[0]
    each = iter(filled)
    return tree.unflatten(structure, [next(each) if tree.is_variable(x) else None for x in inputs])


class Linearisation:
    """The derivative of a function at a point, its graph built once; many products from it."""

    def __init__(self, function: Callable[..., Tree], *arguments: Tree, name: str) -> None:
        """Evaluate `function` and keep its graph.

        Args:
            function: of `arguments`; differentiable.
            arguments: trees; what they were computed from is not differentiated.
            name: what to call `function` in an error.

        Raises:
            LostGradientError: if the function closes over a tensor that requires grad.
        """
        self._inputs = tuple(variables(argument) for argument in arguments)
        with torch.enable_grad():
            self._outputs = function(*self._inputs)
            refuse_hidden(self._outputs, self._inputs, name)
        self.value = tree.detach(self._outputs)
        self._places = [
            i
            for i, y in enumerate(tree.leaves_of(self._outputs))
            if isinstance(y, Tensor) and y.requires_grad
        ]
        leaves = tree.leaves_of(self._outputs)
        self._ys = [leaves[i] for i in self._places]
        self._slopes: dict[int, tuple[list[Tensor], list[Tensor | None]]] = {}

    def pull(self, cotangent: Tree, argument: int = 0) -> Tree:
        """The adjoint of the derivative in one argument, applied to a vector of the values.

        Args:
            cotangent: no None in places of variables.
            argument: which.

        Returns:
            A vector of the space of the argument; None where the value does not depend on it.
        """
        point = self._inputs[argument]
        if isinstance(point, Tensor) and isinstance(cotangent, Tensor):
            if not self._ys:
                return None
            return torch.autograd.grad(
                self._ys, point, cotangent, retain_graph=True, allow_unused=True
            )[0]
        leaves, structure = tree.flatten(point)
        wanted = [x for x in leaves if tree.is_variable(x)]
        vectors = tree.leaves_of(cotangent)
        if not self._ys or not wanted:
            return tree.unflatten(structure, [None] * len(leaves))
        given = [vectors[i] for i in self._places]
        found = iter(
            torch.autograd.grad(self._ys, wanted, given, retain_graph=True, allow_unused=True)
        )
        return tree.unflatten(
            structure, [next(found) if tree.is_variable(x) else None for x in leaves]
        )

    def push(self, direction: Tree, argument: int = 0) -> Tree:
        """The derivative in one argument along a direction: that of the pullback in its cotangent.

        Args:
            direction: a vector of the space of the argument.
            argument: which.

        Returns:
            A vector of the space of the values; None where they do not depend on the argument.
        """
        leaves, structure = tree.flatten(self._outputs)
        inputs, directions = (
            tree.leaves_of(self._inputs[argument]),
            tree.leaves_of(direction),
        )
        moved = [i for i, d in enumerate(directions) if d is not None]
        if argument not in self._slopes:
            wanted = [x for x in inputs if tree.is_variable(x)]
            cotangents = [torch.zeros_like(y, requires_grad=True) for y in self._ys]
            pulled: Sequence[Tensor | None] = (
                torch.autograd.grad(
                    self._ys, wanted, cotangents, create_graph=True, allow_unused=True
                )
                if self._ys and wanted
                else [None] * len(wanted)
            )
            each = iter(pulled)
            slopes = [next(each) if tree.is_variable(x) else None for x in inputs]
            self._slopes[argument] = cotangents, slopes
        cotangents, slopes = self._slopes[argument]
        pairs = [
            (p, directions[i]) for i in moved if (p := slopes[i]) is not None and p.requires_grad
        ]
        tangents: Sequence[Tensor | None] = [None] * len(cotangents)
        if pairs:
            ps, ds = zip(*pairs, strict=True)
            tangents = torch.autograd.grad(ps, cotangents, ds, retain_graph=True, allow_unused=True)
        found: list[Tensor | None] = [
            torch.zeros_like(y) if tree.is_variable(y) else None for y in leaves
        ]
        for i, tangent in zip(self._places, tangents, strict=True):
            found[i] = found[i] if tangent is None else tangent
        return tree.unflatten(structure, found)


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
            variable = getattr(node, "variable", None)
            if isinstance(variable, Tensor):
                yield variable
        for previous, _ in edges:
            if previous is not None and previous not in seen:
                seen.add(previous)
                pending.append(previous)


def refuse_hidden(outputs: Tree, inputs: Tree, name: str) -> None:
    """Refuse `outputs` whose graph reaches a tensor that is not among `inputs`.

    With `inputs` empty this is one look at `requires_grad`: nothing then should have a graph.

    Args:
        outputs: what the user's function returned.
        inputs: the trees it was given; what lies behind them is no concern of the function.
        name: what to call the function.

    Raises:
        LostGradientError: if something that requires grad was closed over.
    """
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


def refuse_setting(value: Tree, name: str) -> None:
    """Refuse a setting that requires grad: it is no argument, so its gradient would be lost.

    Args:
        value: what was given, or what a function of a detached control returned.
        name: what the user calls it.

    Raises:
        ArgumentError: if it requires grad.
    """
    if any(isinstance(x, Tensor) and x.requires_grad for x in tree.leaves_of(value)):
        raise ArgumentError(
            f"{name} is a tensor that requires grad, which no gradient would reach: make it part "
            f"of the control, and pass a function such as lambda control: control['{name}']."
        )


def recording() -> torch.enable_grad:
    """Grad mode on, whatever the caller's mode: a sweep differentiates by itself."""
    return torch.enable_grad()


def paused() -> torch.no_grad:
    """Grad mode off: arithmetic on vectors leaves no graph."""
    return torch.no_grad()


def is_taped(values: Tree) -> bool:
    """Whether what is computed from `values` leaves a graph."""
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree.leaves_of(values))


def pushforward(
    function: Callable[..., Tree], arguments: tuple[Tree, ...], directions: tuple[Tree, ...]
) -> tuple[Tree, Tree]:
    """Value of `function`, and its derivative in its arguments along `directions`.

    The derivative is that of the pullback, which is linear, in its cotangent: it needs nothing
    but reverse derivatives of what `function` uses. It is detached on purpose: third derivatives
    of some kernels of torch (batch normalisation) are wrong in silence.

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
    with torch.enable_grad():
        inputs = told_apart(arguments, set())
        value = function(*inputs)
        if not attached:
            refuse_hidden(value, inputs, "the function")
        leaves, structure = tree.flatten(value)
        found: list[Tensor | None] = [
            torch.zeros_like(y) if tree.is_variable(y) else None for y in leaves
        ]
        places = [i for i, y in enumerate(leaves) if isinstance(y, Tensor) and y.requires_grad]
        moved = [
            (x, d)
            for x, d in zip(
                tree.leaves_of(inputs), tree.leaves_of(tree.detach(directions)), strict=True
            )
            if tree.is_variable(x) and d is not None
        ]
        if places and moved:
            xs, ds = zip(*moved, strict=True)
            cotangents = [torch.zeros_like(leaves[i], requires_grad=True) for i in places]
            ys = [leaves[i] for i in places]
            pulled = torch.autograd.grad(ys, xs, cotangents, create_graph=True, allow_unused=True)
            pairs = [(p, d) for p, d in zip(pulled, ds, strict=True) if p is not None]
            if pairs:
                ps, ds = zip(*pairs, strict=True)
                tangents = torch.autograd.grad(
                    ps, cotangents, ds, retain_graph=attached, allow_unused=True
                )
                for i, tangent in zip(places, tangents, strict=True):
                    found[i] = found[i] if tangent is None else tangent
    return value if attached else tree.detach(value), tree.unflatten(structure, found)


Reverse = Callable[[list[Any], list[Any], list[Any]], list[Any]]
Again = Callable[[list[Any], list[Any], list[Any]], tuple[list[Any], list[Any]]]


def _save(ctx: Any, values: list[Any]) -> None:
    """Tensors with the graph, which frees them and guards them against writes; others aside."""
    ctx.constants = [None if isinstance(x, Tensor) else x for x in values]
    ctx.is_tensor = [isinstance(x, Tensor) for x in values]
    ctx.save_for_backward(*(x for x in values if isinstance(x, Tensor)))


def _saved(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [
        next(tensors) if is_tensor else constant
        for is_tensor, constant in zip(ctx.is_tensor, ctx.constants, strict=True)
    ]


class _Reversible(torch.autograd.Function):
    """A function of leaves whose backward is a callable of what its forward kept."""

    @staticmethod
    def forward(ctx: Any, run: Callable, again: Again, *inputs: Any) -> tuple[Any, ...]:
        outputs, kept, ctx.reverse = run(list(inputs))
        ctx.n_inputs, ctx.again = len(inputs), again
        _save(ctx, [*inputs, *kept])
        ctx.is_variable = [tree.is_variable(y) for y in outputs]
        # Copies, so that the caller may write to them: the originals are kept for the backward.
        outputs = tuple(y.clone() if isinstance(y, Tensor) else y for y in outputs)
        ctx.mark_non_differentiable(
            *(y for y in outputs if isinstance(y, Tensor) and not tree.is_variable(y))
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        everything = _saved(ctx)
        inputs, kept = everything[: ctx.n_inputs], everything[ctx.n_inputs :]
        vectors = [v if ok else None for v, ok in zip(cotangents, ctx.is_variable, strict=True)]
        create_graph = torch.is_grad_enabled()
        gradients = ctx.reverse(inputs, kept, vectors)
        if create_graph:
            gradients = _FirstDerivative.apply(
                ctx.again, ctx.n_inputs, *gradients, *inputs, *vectors
            )
        return (None, None, *gradients)


class _FirstDerivative(torch.autograd.Function):
    """The identity on gradients, whose backward is the second derivative."""

    @staticmethod
    def forward(ctx: Any, again: Again, n_inputs: int, *values: Any) -> tuple[Any, ...]:
        gradients, sources = values[:n_inputs], values[n_inputs:]
        ctx.again, ctx.n_inputs = again, n_inputs
        _save(ctx, list(sources))
        ctx.set_materialize_grads(False)
        return tuple(g if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *directions: Any) -> tuple[Any, ...]:
        sources = _saved(ctx)
        create_graph = torch.is_grad_enabled()
        inputs, cotangents = sources[: ctx.n_inputs], sources[ctx.n_inputs :]
        first, second = ctx.again(inputs, cotangents, list(directions))
        found = [*first, *second]
        if create_graph:
            found = [g if g is None else _Last.apply(g, *sources, *directions) for g in found]
        return (None, None, *[None] * ctx.n_inputs, *found)


class _Last(torch.autograd.Function):
    """The identity on a second derivative; a third is an error, never a silent zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_sources: Any) -> Tensor:  # noqa: ARG004
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_cotangents: Any) -> Any:  # noqa: ARG004
        raise UnsupportedError(
            "a rollout with states kept has no third derivative; pass "
            "checkpointing=Checkpointing(block=None), which keeps the graphs and differentiates "
            "any number of times."
        )


@contextmanager
def no_transforms() -> Iterator[None]:
    """Under a `torch.func` transform, say so and what to do.

    Raises:
        UnsupportedError: instead of what torch raises there.
        RuntimeError: any other.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(name in str(error) for name in ("functorch", "vmap")):
            raise
        raise UnsupportedError(
            "torch.func transforms cannot pass through a rollout with states kept; use "
            "torch.autograd.grad, or checkpointing=Checkpointing(block=None)."
        ) from error


def reversible(
    run: Callable[[list[Any]], tuple[list[Any], list[Any], Reverse]],
    again: Again,
    inputs: list[Any],
) -> tuple[Any, ...]:
    """Outputs of `run`, whose backward is the reverse that `run` returns.

    Args:
        run: `inputs -> (outputs, kept, reverse)` with
            `reverse(inputs, kept, cotangents) -> gradients` of the inputs, None where there is
            none. What is kept is freed with the graph, and guarded against writes in place.
        again: `(inputs, cotangents, directions) -> (for inputs, for cotangents)`: the derivative
            of Re<directions, gradients> in both.
        inputs: leaves.

    Returns:
        The outputs, attached to the graph of the inputs.

    Raises:
        UnsupportedError: under a `torch.func` transform.
    """
    with no_transforms():
        return _Reversible.apply(run, again, *inputs)  # pyright: ignore[reportReturnType]
