"""The derivative of a function at a point, for many products."""

import math
from collections.abc import Callable
from functools import cached_property

from torch import Tensor

from bilevel import tree
from bilevel.autodiff.gradients import grad, slopes, spread, tangents
from bilevel.autodiff.graphs import recording, refuse_hidden, variables
from bilevel.tree import Tree


class Linearisation:
    """The derivative of a function at a point, its graph built once; many products from it.

    Attributes:
        value: of the function there, detached.
        passes: made so far through the graph.
    """

    def __init__(self, function: Callable[..., Tree], *arguments: Tree, name: str) -> None:
        """Evaluate `function` and keep its graph."""
        self._inputs = tuple(variables(argument) for argument in arguments)
        with recording():
            self._outputs = function(*self._inputs)
            refuse_hidden(self._outputs, self._inputs, name)
        self.value = tree.detach(self._outputs)
        leaves = tree.leaves_of(self._outputs)
        self._places = [
            i for i, y in enumerate(leaves) if isinstance(y, Tensor) and y.requires_grad
        ]
        self._ys = [leaves[i] for i in self._places]
        self._slopes: dict[int, tuple[list[Tensor], Tree]] = {}
        self.passes = 0

    def pull(self, cotangent: Tree, argument: int = 0) -> Tree:
        """The adjoint of the derivative in one argument, applied to a vector of the values."""
        self.passes += 1
        vectors = tree.leaves_of(cotangent)
        given = [vectors[i] for i in self._places]
        return grad(self._ys, self._inputs[argument], given, retain_graph=True)

    def pull_all(self, cotangents: Tree, argument: int = 0) -> Tree:
        """`pull` of several vectors at once.

        Args:
            cotangents: vectors of the values, stacked on a leading axis.
            argument: which.

        Returns:
            As many vectors, stacked likewise.

        Raises:
            RuntimeError: if an operation on the way has no rule for several.
        """
        self.passes += 1
        vectors = tree.leaves_of(cotangents)
        given = [vectors[i] for i in self._places]
        inputs = self._inputs[argument]
        return grad(self._ys, inputs, given, retain_graph=True, batched=True)

    @cached_property
    def size(self) -> int:
        """Numbers that a pull passes through its graph: what a further vector beside it takes."""
        todo, seen, total = [y.grad_fn for y in self._ys], set(), 0
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            total += sum(math.prod(given.shape) for given in node._input_metadata)
            todo.extend(parent for parent, _ in node.next_functions)
        return total

    def push(self, direction: Tree, argument: int = 0) -> Tree:
        """The derivative in one argument along a direction: that of the pullback in its cotangent.

        Args:
            direction: a vector of the space of the argument.
            argument: which.

        Returns:
            A vector of the space of the values; zero where they do not depend on the argument.
        """
        self.passes += 1
        if argument not in self._slopes:
            self._slopes[argument] = slopes(self._ys, self._inputs[argument])
        cotangents, pulled = self._slopes[argument]
        return spread(tangents(cotangents, pulled, direction, retain_graph=True), self._outputs)
