"""Tasks of one bilevel problem side by side: one inner iteration for all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.errors import ArgumentError, StructureError, UnsupportedError
from bilevel.inner.problem import BilevelProblem
from bilevel.optim.rules import InnerOptimizer
from bilevel.settings import Stepwise
from bilevel.tasks.problem import Vmapped
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class _Steps(Stepwise):
    """Batches of each step, of all tasks."""

    each: Sequence[Stepwise]

    def at(self, t: int) -> Any:
        return stacked([batches.at(t) for batches in self.each])


def stacked(batches: Sequence[Any]) -> Any:
    """The batches of the tasks as one, their tensors stacked on a first axis.

    Args:
        batches: one a task, alike in structure and shape; all of them may change with the step.

    Returns:
        The batch.

    Raises:
        StructureError: if they are not alike.
    """
    if all(isinstance(batch, Stepwise) for batch in batches):
        return _Steps(batches)
    first = batches[0]
    for batch in batches[1:]:
        source = "tasks side by side need batches of one shape; Looped() takes one after another"
        tree.check_like(batch, first, "batch", source)

    def together(*leaves: Any) -> Any:
        if isinstance(leaves[0], Tensor):
            return torch.stack(leaves)
        if any(leaf != leaves[0] for leaf in leaves):
            raise StructureError(
                f"tasks side by side share what is no tensor, got {leaves[0]!r} and others: make "
                "tensors of it, or take Looped()."
            )
        return leaves[0]

    return tree.map_leaves(together, *batches)


def copies(values: Tree, n: int) -> Tree:
    """The same variables for each of n tasks, on a first axis."""
    return tree.map_leaves(
        lambda x: x.expand(n, *x.shape).clone() if tree.is_variable(x) else x, values
    )


def side_by_side(
    problem: BilevelProblem, optimizer: InnerOptimizer, n: int, evaluate: Vmapped
) -> BilevelProblem:
    """The problem of n tasks with params of their own and one control.

    Args:
        problem: that of one task.
        optimizer: the rule, which must not couple the tasks.
        n: how many.
        evaluate: by `torch.func.vmap`.

    Returns:
        The problem whose params and batches have a first axis of tasks: f is the sum of theirs, F
        the mean.

    Raises:
        ArgumentError: if the problem has columns already.
        UnsupportedError: if the rule would couple the tasks.
    """
    if problem.columns is not None:
        raise ArgumentError(
            "the problem has columns already, which take the first axis of the params: accumulate "
            "by evaluate=Looped()."
        )
    if not optimizer.separable:
        raise UnsupportedError(
            f"the steps of this {type(optimizer).__name__} couple the entries of a leaf over its "
            "first axis, and so tasks side by side: accumulate by evaluate=Looped(); name axes of "
            "a set or a group from the end, as in dim=-1."
        )

    def each(function: Callable[..., Tensor]) -> Callable[[Tree, Tree, Any], Tensor]:
        def values(params: Tree, control: Tree, batch: Any) -> Tensor:
            return _mapped(function, params, control, batch, evaluate)

        return values

    inner, outer = each(problem.inner), each(problem.outer)
    start, running = problem.start, problem.outer_each

    def begun(params: Tree, control: Tree) -> Tree:
        first = tree.map_leaves(lambda x: x[0] if tree.is_variable(x) else x, params)
        return copies(start(first, control), n) if start is not None else params

    def on_the_way(params: Tree, control: Tree, batch: Any, t: int) -> Tensor:
        at_step = each(lambda p, c, b: problem.running(p, c, b, t))
        return at_step(params, control, batch).mean()

    return BilevelProblem(
        lambda params, control, batch: inner(params, control, batch).sum(),
        lambda params, control, batch: outer(params, control, batch).mean(),
        None if start is None else begun,
        columns=n,
        outer_each=None if running is None else on_the_way,
    )


def _mapped(
    function: Callable[..., Tensor], params: Tree, control: Tree, batch: Any, evaluate: Vmapped
) -> Tensor:
    """The function of each task, shape ``(n,)``."""
    variables, joined = _apart(params, tree.is_variable)
    tensors, batched = _apart(batch, lambda x: isinstance(x, Tensor))

    def one(own: list[Tensor], given: list[Tensor]) -> Tensor:
        return function(joined(own), control, batched(given))

    try:
        mapped = torch.func.vmap(one, randomness=evaluate.randomness)
        return mapped(variables, tensors)
    except RuntimeError as error:
        if not any(name in str(error) for name in ("vmap", "functorch", "torch.func")):
            raise
        raise UnsupportedError(
            "the tasks cannot be evaluated side by side: accumulate by evaluate=Looped(), or for "
            "losses that draw Vmapped(randomness='different'). From torch.func.vmap came: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _apart(
    values: Tree, chosen: Callable[[Any], bool]
) -> tuple[list[Tensor], Callable[[list[Tensor]], Tree]]:
    """Some leaves, and what puts others in their places."""
    leaves, structure = tree.flatten(values)

    def joined(others: list[Tensor]) -> Tree:
        each = iter(others)
        return tree.unflatten(structure, [next(each) if chosen(x) else x for x in leaves])

    return [x for x in leaves if chosen(x)], joined
