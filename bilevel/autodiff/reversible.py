"""A function whose backward is a sweep of one's own, differentiable twice."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.errors import UnsupportedError


class Reversible(ABC):
    """One evaluation of a function of leaves, which knows its own derivatives."""

    @abstractmethod
    def forward(self, inputs: list[Any]) -> tuple[list[Any], list[Any]]:
        """Outputs, and what to keep: freed with the graph, guarded against writes in place."""

    @abstractmethod
    def reverse(self, inputs: list[Any], kept: list[Any], cotangents: list[Any]) -> list[Any]:
        """Gradients of Re<cotangents, outputs> in the inputs; None where there is none."""

    @abstractmethod
    def again(
        self, inputs: list[Any], cotangents: list[Any], directions: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Derivatives of Re<directions, reverse(...)> in the inputs and in the cotangents."""


def reversible(function: Reversible, inputs: list[Any]) -> tuple[Any, ...]:
    """Outputs of `function`, whose backward is its `reverse`, and whose double one its `again`."""
    with no_transforms():
        return _Reversible.apply(function, *inputs)  # pyright: ignore[reportReturnType]


@contextmanager
def no_transforms() -> Iterator[None]:
    """Under a `torch.func` transform, say so and what to do."""
    try:
        yield
    except RuntimeError as error:
        if not any(name in str(error) for name in ("functorch", "vmap")):
            raise
        raise UnsupportedError(
            "torch.func transforms cannot pass through a rollout with states kept; use "
            "torch.autograd.grad, or checkpointing=Checkpointing(block=None)."
        ) from error


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


# Each of the three functions below is one derivative further. A gradient that was computed by hand
# has no graph; where one is asked for (create_graph, which shows as grad mode inside a backward) it
# is passed through the identity of the next function, whose backward is the next derivative.


class _Reversible(torch.autograd.Function):
    """The function itself."""

    @staticmethod
    def forward(ctx: Any, function: Reversible, *inputs: Any) -> tuple[Any, ...]:
        outputs, kept = function.forward(list(inputs))
        ctx.function, ctx.n_inputs = function, len(inputs)
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
        gradients = ctx.function.reverse(inputs, kept, vectors)
        if create_graph:
            gradients = _FirstDerivative.apply(
                ctx.function, ctx.n_inputs, *gradients, *inputs, *vectors
            )
        return (None, *gradients)


class _FirstDerivative(torch.autograd.Function):
    """The identity on gradients, whose backward is the second derivative."""

    @staticmethod
    def forward(ctx: Any, function: Reversible, n_inputs: int, *values: Any) -> tuple[Any, ...]:
        gradients, sources = values[:n_inputs], values[n_inputs:]
        ctx.function, ctx.n_inputs = function, n_inputs
        _save(ctx, list(sources))
        ctx.set_materialize_grads(False)
        return tuple(g if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *directions: Any) -> tuple[Any, ...]:
        sources = _saved(ctx)
        create_graph = torch.is_grad_enabled()
        inputs, cotangents = sources[: ctx.n_inputs], sources[ctx.n_inputs :]
        first, second = ctx.function.again(inputs, cotangents, list(directions))
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
