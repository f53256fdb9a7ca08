"""A function whose derivatives, forward and reverse, are computed by hand; once."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import UnsupportedError


class ByHand(ABC):
    """A function of tensors that knows its derivative where it was last evaluated.

    It works under `torch.autograd`, forward mode included, and the transforms of `torch.func`, of
    which `vmap` evaluates one member after another.
    """

    @abstractmethod
    def again(self) -> "ByHand":
        """The same function, not evaluated yet."""

    @abstractmethod
    def evaluate(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The outputs; what the derivatives need is kept."""

    @abstractmethod
    def pull(self, cotangents: list[Tensor]) -> tuple[Tensor, ...]:
        """The adjoint of the derivative: one gradient an input."""

    @abstractmethod
    def push(self, tangents: list[Tensor]) -> tuple[Tensor, ...]:
        """The derivative: one tangent an output."""

    @abstractmethod
    def twice(self) -> str:
        """What to say to who asks for a second derivative."""

    def __call__(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The outputs, attached to the graph of the inputs."""
        return _Function.apply(self, *inputs)  # pyright: ignore[reportReturnType]


def _each(function: Any, given: Any, in_dims: Any, size: int) -> tuple[tuple[Tensor, ...], Any]:
    """`function` of every member of a mapped axis, the outputs stacked."""
    rows = [
        function(
            *(
                x if dim is None or not isinstance(x, Tensor) else x.select(dim, i)
                for x, dim in zip(given, in_dims, strict=True)
            )
        )
        for i in range(size)
    ]
    outputs = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    return outputs, (0,) * len(outputs)


class _Function(torch.autograd.Function):
    """The function itself."""

    @staticmethod
    def forward(function: ByHand, *inputs: Tensor) -> tuple[Tensor, ...]:
        return function.evaluate([x.detach().clone() for x in inputs])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        function, *leaves = inputs
        ctx.function = function
        ctx.save_for_backward(*leaves)
        ctx.save_for_forward(*leaves)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        leaves = ctx.saved_tensors
        return None, *_Pulled.apply(ctx.function, len(leaves), *leaves, *cotangents)  # pyright: ignore[reportGeneralTypeIssues]

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        leaves, tangents = ctx.saved_tensors, grad_inputs[1:]
        given = [
            torch.zeros_like(x) if dx is None else dx
            for x, dx in zip(leaves, tangents, strict=True)
        ]
        return _Pushed.apply(ctx.function, len(leaves), *leaves, *given)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        function, *inputs = args

        def one(*leaves: Tensor) -> tuple[Tensor, ...]:
            return _Function.apply(function.again(), *leaves)  # pyright: ignore[reportReturnType]

        return _each(one, inputs, in_dims[1:], info.batch_size)


class _Derivative(torch.autograd.Function):
    """A derivative, whose own one is refused by name; it never is a silent zero."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.function = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        del cotangents
        raise UnsupportedError(ctx.function.twice())

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        del tangents
        raise UnsupportedError(ctx.function.twice())


class _Pulled(_Derivative):
    """The adjoint of the derivative."""

    @staticmethod
    def forward(function: ByHand, n: int, *values: Tensor) -> tuple[Tensor, ...]:
        return function.pull([x.detach() for x in values[n:]])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        function, n, *values = args

        def one(*members: Tensor) -> tuple[Tensor, ...]:
            return _Pulled.apply(function, n, *members)  # pyright: ignore[reportReturnType]

        return _each(one, values, in_dims[2:], info.batch_size)


class _Pushed(_Derivative):
    """The derivative."""

    @staticmethod
    def forward(function: ByHand, n: int, *values: Tensor) -> tuple[Tensor, ...]:
        return function.push([x.detach() for x in values[n:]])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        function, n, *values = args

        def one(*members: Tensor) -> tuple[Tensor, ...]:
            return _Pushed.apply(function, n, *members)  # pyright: ignore[reportReturnType]

        return _each(one, values, in_dims[2:], info.batch_size)
