"""Derivatives inside of whatever differentiates the caller: plain autograd or `torch.func`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, unwrap_if_dead
from torch.autograd.forward_ad import _set_fwd_grad_enabled, unpack_dual

from bilevel import tree
from bilevel.autodiff.gradients import grad
from bilevel.autodiff.graphs import is_taped, recording

Function = Callable[..., Sequence[Tensor]]  # of tensors
Dims = tuple[int | None, ...]  # which tensors have a leading axis of members, 0 or None


def transformed() -> bool:
    """Whether a transform of `torch.func` is at work."""
    # What `torch.autograd.Function.apply` itself asks; there is no public name for it.
    return torch._C._are_functorch_transforms_active()


def followed(x: Any) -> bool:
    """Whether a derivative in `x` may be asked for: by autograd, or by a transform."""
    return isinstance(x, Tensor) and (x.requires_grad or is_functorch_wrapped_tensor(x))


def alive(x: Tensor) -> Tensor:
    """What a tensor saved under a transform that has ended stands for."""
    return unwrap_if_dead(x)


def pull_at(
    function: Function, point: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    """The adjoint of the derivative of `function` at a point, applied to cotangents.

    It is differentiable once more in the point, the cotangents and whatever `function` closes over,
    by the means by which the caller is differentiated.

    Args:
        function: of floating-point and complex tensors, to a sequence of such.
        point: where.
        cotangents: one a value.

    Returns:
        One tensor an argument; zero where nothing depends on it.
    """
    return value_and_pull_at(function, point, cotangents)[1]


def value_and_pull_at(
    function: Function, point: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Sequence[Tensor], list[Tensor]]:
    """The values of `function`, differentiable likewise, and what `pull_at` returns."""
    if not point:
        return function(), []
    if transformed():
        values, pull, *_ = torch.func.vjp(lambda *xs: tuple(function(*xs)), *point)
        return values, list(pull(tuple(cotangents)))
    attached = torch.is_grad_enabled()
    with recording():
        # Aliases: what one argument was computed from another by is no part of the derivative.
        xs = [x.view_as(x) if attached and x.requires_grad else _leaf(x) for x in point]
        values = function(*xs)
        pairs = [(y, v) for y, v in zip(values, cotangents, strict=True) if y.requires_grad]
        found = grad([y for y, _ in pairs], xs, [v for _, v in pairs], create_graph=attached)
    values = values if attached else [y.detach() for y in values]
    return values, [
        torch.zeros_like(x) if g is None else g for x, g in zip(point, found, strict=True)
    ]


def _leaf(x: Tensor) -> Tensor:
    """A tensor to differentiate in, of which a graph that is left of it is no one else's."""
    leaf = tree.detached(x).requires_grad_()
    leaf.passing = True  # pyright: ignore[reportAttributeAccessIssue]  # known to `refuse_hidden`
    return leaf


def push_at(
    function: Function, point: Sequence[Tensor], directions: Sequence[Tensor]
) -> list[Tensor]:
    """The derivative of `function` at a point along directions, differentiable as `pull_at` is.

    It is the adjoint of the adjoint, so that nothing needs a rule of forward differentiation.

    Args:
        function: of tensors.
        point: where.
        directions: one an argument.

    Returns:
        One tensor a value.
    """
    with torch.no_grad():
        values = function(*point)
    zeros = [torch.zeros_like(y) for y in values]
    return pull_at(lambda *vs: pull_at(function, point, vs), zeros, directions)


def mapped(function: Function, size: int, dims: Dims) -> Function:
    """`function` of each member of a batch: at once, or one after the other where vmap refuses."""
    return partial(_mapped, function, size, dims)


def _mapped(function: Function, size: int, dims: Dims, *tensors: Tensor) -> Sequence[Tensor]:
    try:
        return torch.vmap(lambda *xs: tuple(function(*xs)), in_dims=dims)(*tensors)
    except Exception:  # a function that looks at values, say; errors of its own come again below
        each = [function(*member(tensors, dims, k)) for k in range(size)]
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


def member(tensors: Sequence[Tensor], dims: Dims, k: int) -> list[Tensor]:
    """Member `k` of tensors with a leading axis where `dims` says so."""
    return [x if d is None else x[k] for x, d in zip(tensors, dims, strict=True)]


def leading(tensors: Sequence[Tensor], axes: Sequence[int | None]) -> tuple[list[Tensor], Dims]:
    """Tensors with the axis of their members moved to the front, and which have one."""
    found = [x if d is None else x.movedim(d, 0) for x, d in zip(tensors, axes, strict=True)]
    return found, tuple(None if d is None else 0 for d in axes)


def sheltered(function: Function, *tensors: Tensor) -> Sequence[Tensor]:
    """`function` of tensors, differentiable, which meets plain tensors whatever is at work.

    Under transforms of `torch.func` it is differentiated by `pull_at` and `push_at` of plain
    tensors, and mapped by `mapped`. So it may look at values, and call what has no rules for them.

    Args:
        function: of tensors; it closes over none that is being differentiated.
        tensors: what it gets.

    Returns:
        Its values.
    """
    if not transformed():
        # Without a graph to continue none is left: what `function` makes on the way has one.
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_taped(tensors)):
            return function(*tensors)
    found: Any = _Sheltered.apply(function, *tensors)
    return found


class _Sheltered(torch.autograd.Function):
    """A function that is never traced; its derivatives are such functions again."""

    @staticmethod
    def forward(function: Function, *tensors: Tensor) -> Any:
        return tuple(y.detach().clone() for y in function(*(x.detach() for x in tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        tensors = [alive(x) for x in ctx.saved_tensors]
        places = [i for i, x in enumerate(tensors) if varies(x)]
        found = pull_in(ctx.function, places, tensors, [alive(v) for v in cotangents])
        return None, *placed(found, places, len(tensors))

    @staticmethod
    def jvp(ctx: Any, *directions: Any) -> Any:
        with forwards_again():
            tensors = [undirected(x) for x in ctx.saved_tensors]
            places = [i for i, e in enumerate(directions[1:]) if e is not None]
            along = [directions[1 + i] for i in places]
            return tuple(push_in(ctx.function, places, tensors, along))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> Any:
        tensors, dims = leading(given[1:], in_dims[1:])
        found = sheltered(mapped(given[0], info.batch_size, dims), *tensors)
        return tuple(found), (0,) * len(found)


def at_places(
    derivative: Callable[..., list[Tensor]],
    function: Function,
    n: int,
    places: Sequence[int],
    *tensors: Tensor,
) -> list[Tensor]:
    """`pull_at` or `push_at` of a function in some of its `n` arguments, by the vectors beyond."""
    point, vectors = tensors[:n], tensors[n:]
    return derivative(
        lambda *xs: function(*put(point, places, xs)), [point[i] for i in places], vectors
    )


def pull_in(
    function: Function, places: Sequence[int], point: Sequence[Tensor], vectors: Sequence[Tensor]
) -> Sequence[Tensor]:
    """`pull_at` in some of the arguments, sheltered."""
    pulled = partial(at_places, pull_at, function, len(point), places)
    return sheltered(pulled, *point, *vectors) if places else []


def push_in(
    function: Function, places: Sequence[int], point: Sequence[Tensor], vectors: Sequence[Tensor]
) -> Sequence[Tensor]:
    """`push_at` in some of the arguments, sheltered."""
    return sheltered(partial(at_places, push_at, function, len(point), places), *point, *vectors)


def varies(x: Tensor) -> bool:
    """Whether a tensor can be differentiated in."""
    return x.is_floating_point() or x.is_complex()


def put(tensors: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """A list with other values in some places."""
    found = list(tensors)
    for i, x in zip(places, values, strict=True):
        found[i] = x
    return found


def placed(values: Sequence[Any], places: Sequence[int], length: int) -> list[Any]:
    """Values in their places, None elsewhere."""
    return put([None] * length, places, values)


def undirected(x: Tensor) -> Tensor:
    """A tensor without the direction along which it is being differentiated."""
    return unpack_dual(alive(x)).primal


def forwards_again() -> Any:
    """Forward differentiation on inside of a `jvp` rule."""
    # torch switches it off there, by which the outer one of two nested ones would lose its part in
    # silence.
    return _set_fwd_grad_enabled(True)
