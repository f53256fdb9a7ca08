r"""Learned weights of training tasks: the bilevel problem (3).

.. math::
    \min_\alpha \sum_j l_{v_j}(\theta(\alpha)) \quad \text{where} \quad
    \theta(\alpha) = \arg\min_\theta \sum_i \sigma(\alpha)_i\, l_{\tau_i}(\theta)

With a matrix alpha, column j weighs the training tasks for validation task j and has a theta of its
own; :math:`\sigma(\alpha_j)_i` is read as the learned correlation of training task i with
validation task j.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_arguments, check_choice, check_kind, check_scalar
from bilevel.errors import ArgumentError, DivergenceError, StructureError, UnsupportedError
from bilevel.inner.problem import BilevelProblem
from bilevel.tasks.weights import TaskWeights
from bilevel.tree import Tree

Losses = Callable[[Tree, Any], Tensor]  # (params, batch) -> one loss a task, shape (n,)
Loss = Callable[[Tree, Any], Tensor]  # (params, batch) -> the loss of one task, real scalar


class Evaluation(ABC):
    """How the losses of M independent params are evaluated.

    Example:
        >>> import torch, bilevel as bl
        >>> params = torch.tensor([[1.0], [2.0], [3.0]])  # of 3 columns
        >>> losses = lambda w, batch: torch.stack([w.sum(), (w**2).sum()])
        >>> bl.Looped().losses(losses, params, None, 3)
        tensor([[1., 1.],
                [2., 4.],
                [3., 9.]])
    """

    @abstractmethod
    def losses(self, losses: Losses, params: Tree, batch: Any, columns: int) -> Tensor:
        """`losses` of each column of the params.

        Args:
            losses: of one model.
            params: variables with a leading axis of length `columns`.
            batch: the same for all.
            columns: M.

        Returns:
            Shape ``(M, n)``.
        """

    def each(self, losses: Sequence[Callable[[], Tensor]]) -> Tensor:
        """Losses of tasks, one function each.

        Args:
            losses: without arguments, n of them.

        Returns:
            Shape ``(n,)``.
        """
        return torch.stack([loss() for loss in losses])


def _split(params: Tree, columns: int) -> tuple[list[Tensor], Callable[[Sequence[Any]], Tree]]:
    """The variables, which have a leading axis, and what puts columns of them back."""
    leaves, structure = tree.flatten(params)
    for i, leaf in enumerate(leaves):
        if tree.is_variable(leaf) and (not leaf.ndim or leaf.shape[0] != columns):
            name = tree.leaf_names(params, "params")[i]
            raise StructureError(
                f"{name} must have a leading axis of length {columns}, one entry a validation "
                f"task, got shape {tuple(leaf.shape)}; TaskWeights.stacked(params) makes it."
            )

    def joined(variables: Sequence[Any]) -> Tree:
        each = iter(variables)
        return tree.unflatten(structure, [next(each) if tree.is_variable(x) else x for x in leaves])

    return [x for x in leaves if tree.is_variable(x)], joined


@final
@dataclass(frozen=True)
class Vmapped(Evaluation):
    """All columns together under `torch.func.vmap`; differentiation stays outside of it.

    Attributes:
        randomness: as in `torch.func.vmap`, for losses that draw (dropout): "error", or whether
            columns draw the "same" or "different" numbers.

    Example:
        >>> import torch, bilevel as bl
        >>> weights = bl.TaskWeights(n_tasks=2, n_validations=2)
        >>> problem = bl.weighted_problem(
        ...     lambda w, batch: torch.stack([w**2, (w - 1) ** 2]),
        ...     lambda w, batch: torch.stack([(w - 0.1) ** 2, (w - 0.9) ** 2]),
        ...     weights,
        ...     evaluate=bl.Vmapped(),
        ... )
        >>> problem.columns
        2
    """

    randomness: Literal["error", "same", "different"] = "error"

    def __post_init__(self) -> None:
        check_choice(self.randomness, ("error", "same", "different"), "randomness")

    def losses(self, losses: Losses, params: Tree, batch: Any, columns: int) -> Tensor:  # noqa: D102
        variables, joined = _split(params, columns)
        each = torch.func.vmap(lambda *own: losses(joined(own), batch), randomness=self.randomness)
        try:
            return each(*variables)
        except RuntimeError as error:
            if not any(name in str(error) for name in ("vmap", "functorch", "torch.func")):
                raise
            if "randomness" in str(error):
                remedy = "pass evaluate=Vmapped(randomness='different') or 'same', or Looped()"
            else:
                remedy = "pass evaluate=Looped(), which evaluates one column after another"
            raise UnsupportedError(
                f"the losses cannot be evaluated for all columns at once: {remedy}. "
                f"From torch.func.vmap came: {str(error).splitlines()[0]}"
            ) from error


@final
@dataclass(frozen=True)
class Looped(Evaluation):
    """One column after another, for losses that `torch.func` refuses, such as a `rollout`.

    Example:
        >>> import torch, bilevel as bl
        >>> weights = bl.TaskWeights(n_tasks=2, n_validations=2)
        >>> problem = bl.weighted_problem(
        ...     lambda w, batch: torch.stack([w**2, (w - 1) ** 2]),
        ...     lambda w, batch: torch.stack([(w - 0.1) ** 2, (w - 0.9) ** 2]),
        ...     weights,
        ...     evaluate=bl.Looped(),
        ... )
        >>> problem.columns
        2
    """

    def losses(self, losses: Losses, params: Tree, batch: Any, columns: int) -> Tensor:  # noqa: D102
        return torch.stack([losses(own, batch) for own in _each(params, columns)])


def _each(params: Tree, columns: int) -> list[Tree]:
    """The params of each column."""
    variables, joined = _split(params, columns)
    return [joined(own) for own in zip(*(x.unbind(0) for x in variables), strict=True)]


def weighted_problem(
    train_losses: Losses | Sequence[Loss],
    validation_losses: Losses | Sequence[Loss],
    weights: TaskWeights,
    evaluate: Evaluation | None = None,
) -> BilevelProblem:
    """The problem (3) of learned task weights; its control is alpha.

    With a matrix of weights the params carry a leading axis M (`TaskWeights.stacked`), and both
    objectives are sums over the columns, column j being judged by validation loss j alone.

    Args:
        train_losses: `(params, batch) -> losses`, shape ``(N,)``; or N functions, one a task.
        validation_losses: `(params, batch) -> losses`, shape ``(M,)``; any number for a vector. Or
            M functions `(params, batch) -> loss`, a real scalar each: a column then evaluates its
            own alone, instead of all M of which one counts.
        weights: sigma.
        evaluate: how the columns of a matrix are evaluated; None is `Vmapped()`.

    Returns:
        The problem.

    Raises:
        ArgumentError: if an argument is not what it should be.
        StructureError: when it is evaluated, if losses or alpha have another shape.
        DivergenceError: when it is evaluated, if a loss is not finite; it names the loss.

    Example:
        >>> import bilevel as bl
        >>> goals = torch.tensor([1.0, -1.0])
        >>> problem = weighted_problem(
        ...     lambda w, batch: (w - goals) ** 2,
        ...     lambda w, batch: (w - 1) ** 2,
        ...     TaskWeights(2),
        ... )
        >>> problem.inner(torch.tensor(1.0), torch.zeros(2), None)
        tensor(2.)
    """
    check_kind(weights, TaskWeights, "weights", "a TaskWeights")
    check_kind(evaluate, Evaluation | None, "evaluate", "Vmapped() or Looped()")
    n, m = weights.n_tasks, weights.n_validations
    each = Vmapped() if evaluate is None else evaluate
    train = _train(train_losses, n, each if m is None else Looped())
    judge = _judge(validation_losses, m, each)

    def inner(params: Tree, alpha: Tensor, batch: Any) -> Tensor:
        sigma = weights.sigma(alpha)
        if m is None:
            losses = train(params, batch)
            value = (sigma * losses).sum()
        else:
            losses = each.losses(train, params, batch, m)
            value = (sigma.T * losses).sum()
        _check_finite(value, losses, "train_losses")
        return value

    def outer(params: Tree, alpha: Tensor, batch: Any) -> Tensor:
        losses = judge(params, batch)
        value = losses.sum()
        _check_finite(value, losses, "validation_losses")
        if weights.entropy:
            value = value - weights.entropy * weights.spread(weights.sigma(alpha))
        return value

    return BilevelProblem(inner, outer, columns=m)


def _train(given: Losses | Sequence[Loss], n: int, evaluate: Evaluation) -> Losses:
    """The training losses, shape ``(N,)``, of one model."""
    if not callable(given):
        return _apart(_functions(given, n, "train_losses"), None, evaluate, "train_losses")
    check_arguments(given, "train_losses", "params", "batch")
    return lambda params, batch: _checked(given(params, batch), n, "train_losses")


def _judge(given: Losses | Sequence[Loss], m: int | None, evaluate: Evaluation) -> Losses:
    """The validation losses, shape ``(M,)``, of params or of each column its own."""
    name = "validation_losses"
    if not callable(given):
        return _apart(_functions(given, m, name), m, evaluate, name)
    check_arguments(given, name, "params", "batch")

    def together(params: Tree, batch: Any) -> Tensor:
        return _checked(given(params, batch), m, name)

    if m is None:
        return together
    return lambda params, batch: evaluate.losses(together, params, batch, m).diagonal()


def _functions(given: Any, n: int | None, name: str) -> list[Loss]:
    """One loss a task, checked."""
    alone = list(given) if isinstance(given, Sequence) else []
    for loss in alone:
        check_arguments(loss, name, "params", "batch")
    if not alone or not all(callable(loss) for loss in alone) or n not in (None, len(alone)):
        kind = "training" if name == "train_losses" else "validation"
        raise ArgumentError(
            f"{name} must be a function, or {n or 'some'} functions, one a {kind} "
            f"task, got {f'{len(alone)} items' if alone else repr(given)}."
        )
    return alone


def _apart(alone: list[Loss], columns: int | None, evaluate: Evaluation, name: str) -> Losses:
    """Losses of tasks of params; with columns, of the column of each."""

    def losses(params: Tree, batch: Any) -> Tensor:
        each = [params] * len(alone) if columns is None else _each(params, columns)

        def of_task(j: int) -> Tensor:
            return check_scalar(alone[j](each[j], batch), f"{name}[{j}]")

        return evaluate.each([partial(of_task, j) for j in range(len(alone))])

    return losses


def _checked(losses: Any, n: int | None, name: str) -> Tensor:
    """`losses` if they are real and of shape (n,), or (any,)."""
    if (
        isinstance(losses, Tensor)
        and losses.is_floating_point()
        and losses.ndim == int(n is not None or losses.ndim > 0)
        and (losses.numel() > 0 if n is None else losses.shape[0] == n)
    ):
        return losses
    needed = "(M,)" if n is None else f"({n},)"
    raise StructureError(
        f"{name} must return a real tensor of shape {needed}, one loss a task, got "
        f"{tree.kind(losses)}; torch.stack puts scalars together."
    )


def _check_finite(value: Tensor, losses: Tensor, name: str) -> None:
    """Refuse a sum of losses that is not finite because of one of them."""
    # One look at the sum: NaN and infinity stay in it, also under a weight of 0.
    if math.isfinite(value.item()):
        return
    places = (~losses.detach().isfinite()).nonzero().tolist()
    if not places:  # then it is alpha; the solver says so
        return
    *column, task = first = places[0]
    raise DivergenceError(
        f"{name} must be finite, but {name}[{task}]"
        + (f" of column {column[0]}" if column else "")
        + f" is {losses[tuple(first)].item()}"
        + (f", and {len(places) - 1} more are not finite" if len(places) > 1 else "")
        + ": look at the data of that task, or take a smaller inner step size."
    )
