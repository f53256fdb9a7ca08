r"""Any solution as a differentiable function.

Let :math:`w(a)` solve :math:`R(w, a) = 0`, found by whatever means. Then

.. math::
    \text{reverse} \quad v \mapsto -R_a^* q, \; R_w^* q = v \qquad
    \text{forward} \quad e \mapsto -R_w^{-1} R_a e .
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from bilevel import autodiff, tree
from bilevel.checks import check_choice, check_kind, check_range
from bilevel.errors import ArgumentError, UnsupportedError
from bilevel.implicit_function.equations import Equation, Root
from bilevel.implicit_function.question import Form, Question
from bilevel.linear.operator import LinearSolver
from bilevel.outer.watching import ON_FAILURE, OnFailure


class _Solution(torch.autograd.Function):
    """The solution of an equation; its derivatives are solutions of linear ones, by itself."""

    generate_vmap_rule = False

    @staticmethod
    def forward(equation: Equation, *leaves: Tensor) -> Any:
        return tuple(equation.solved([x.detach() for x in leaves]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        equation, *leaves = inputs
        ctx.equation, ctx.n = equation, len(leaves)
        unknowns = equation.spread(equation.unknowns(list(output)), list(output))
        still = [y for y, known in zip(output, unknowns, strict=True) if known is None]
        ctx.mark_non_differentiable(*still)
        ctx.save_for_backward(*leaves, *output)
        ctx.save_for_forward(*leaves, *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        equation, leaves, outputs = _saved(ctx, autodiff.alive)
        _refuse_legacy(cotangents)
        system, point = equation.adjoint(outputs, leaves)
        vectors = equation.unknowns([autodiff.alive(v) for v in cotangents])
        q: Any = _Solution.apply(system, *point, *vectors)
        wanted = list(ctx.needs_input_grad[1:])
        return None, *equation.pulled(outputs, leaves, list(q), wanted)

    @staticmethod
    def jvp(ctx: Any, *directions: Any) -> Any:
        _refuse_legacy(directions[1:])
        with autodiff.forwards_again():
            equation, leaves, outputs = _saved(ctx, autodiff.undirected)
            system, point = equation.tangent(outputs, leaves)
            moved = equation.pushed(outputs, leaves, list(directions[1:]))
            found = list(_Solution.apply(system, *point, *moved))
        return tuple(equation.spread(found, outputs))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> Any:
        equation, axes = given[0], in_dims[1:]
        leaves = [x if d is None else x.movedim(d, 0) for x, d in zip(given[1:], axes, strict=True)]
        dims = tuple(None if d is None else 0 for d in axes)
        equation, leaves = equation.batched(info.batch_size, dims, leaves)
        outputs: Any = _Solution.apply(equation, *leaves)
        return outputs, (0,) * len(outputs)


def _saved(
    ctx: Any, taken: Callable[[Tensor], Tensor]
) -> tuple[Equation, list[Tensor], list[Tensor]]:
    saved = [taken(x) for x in ctx.saved_tensors]
    return ctx.equation, saved[: ctx.n], saved[ctx.n :]


def _refuse_legacy(vectors: Any) -> None:
    """Refuse the batches of `torch.autograd`'s own, older vmap, which no rule of ours sees."""
    if any(v is not None and is_legacy_batchedtensor(v) for v in vectors):
        raise UnsupportedError(
            "vectorize=True and is_grads_batched=True of torch.autograd do not go through an "
            "implicit function: take torch.func.jacrev, jacfwd, hessian or vmap, which do."
        )


def answered(question: Question) -> Any:
    """The solution that was asked for, attached to its arguments; with aux, a pair."""
    # Tensors of inference mode cannot be differentiated: there is nothing to lose here.
    with torch.inference_mode(False):  # dynamo takes no name of the argument
        leaves = [x.clone() if x.is_inference() else x for x in question.given.tensors]
        outputs: Any = _Solution.apply(Root(question), *leaves)
    # Copies, so that the caller may write to them: the originals are kept for the backward.
    solution = question.solution.tree([y.clone() for y in outputs[: question.n]])
    if not question.has_aux:
        return solution
    return solution, question.aux.tree(outputs[question.n :])


def implicit(
    solve: Callable[..., Any] | None = None,
    residual: Callable[..., Any] | None = None,
    *,
    objective: Callable[..., Any] | None = None,
    linear: LinearSolver | None = None,
    has_aux: bool = False,
    vectorized: bool = False,
    tolerance: float = 1e-4,
    on_failure: OnFailure = "warn",
) -> Any:
    r"""A solver, by any means, as a function that is differentiated by the equation it solves.

    The result takes the arguments of `solve`, trees of tensors by place or by name, and returns its
    solution w with R(w, arguments) = 0. Its derivatives are those of the exact solution, of any
    order: by `.backward()`, and under `torch.func.grad`, `jacrev`, `jacfwd`, `vmap`, `hessian`,
    `jvp`, `vjp` and their nestings. No graph goes through `solve`. Gradients reach every tensor
    that the equation reads, floating-point or complex; integers and None are carried along. What
    `solve` alone reads, a first guess or a number of steps, has derivative zero.

    Under `vmap` the equation is mapped too, and the linear systems of all members are solved side
    by side; an equation that `vmap` refuses is evaluated member by member.

    Args:
        solve: called with plain tensors without grad, under vmap once a member. What it returns is
            a tensor or a tree of tensors. None makes `implicit` a decorator.
        residual: R, called as `residual(solution, *arguments)`; it returns a tree like the
            solution, whose leaves that are no variables do not count. Differentiable as often as
            derivatives are wanted; everything differentiated is an argument.
        objective: f in the place of R, a real scalar that `solve` minimises: R is its gradient.
        linear: solver of the linear systems. `CG` needs a derivative of R that is symmetric, which
            is looked at. None forms the matrix up to 64 real unknowns, and takes conjugate
            gradients beyond, or GMRES where it is not symmetric.
        has_aux: whether `solve` returns a pair `(solution, aux)`; aux is handed on as it is, its
            tensors detached. Under vmap its tensors are stacked, and other leaves are those of the
            last member.
        vectorized: whether `solve` can have all members of a vmap at once: every tensor of the
            arguments then has a leading axis, and so must every tensor that it returns.
        tolerance: largest norm of the residual at the solution, relative to the terms that cancel
            in it. Beyond, derivatives are those of no solution.
        on_failure: what to do then, and where a linear system is not solved or singular.

    Returns:
        The function; without `solve`, a decorator.

    Raises:
        ArgumentError: if a setting is not what it should be.

    Source: Griewank & Walther 2008, Evaluating Derivatives, chapter 15.

    Example:
        >>> import bilevel as bl
        >>> def newton(a):  # the cube root, by steps that no graph records
        ...     w = torch.ones_like(a)
        ...     for _ in range(30):
        ...         w = w - (w**3 - a) / (3 * w**2)
        ...     return w
        >>> root = bl.implicit(newton, lambda w, a: w**3 - a)
        >>> a = torch.tensor(8.0, dtype=torch.float64)
        >>> torch.func.grad(root)(a) * 12, torch.func.hessian(root)(a) * 144
        (tensor(1., dtype=torch.float64), tensor(-1., dtype=torch.float64))
    """
    if (residual is None) == (objective is None):
        came = "neither" if residual is None else "both"
        raise ArgumentError(
            "implicit needs the equation that solve solves, residual= or objective=, one of the "
            f"two, got {came}; a residual is called as residual(solution, *arguments)."
        )
    equation: Any = residual if objective is None else objective
    for name, value in (("solve", solve), ("residual", residual), ("objective", objective)):
        if value is not None and not callable(value):
            raise ArgumentError(f"{name} must be a function, got {tree.kind(value)}.")
    check_kind(linear, LinearSolver | None, "linear", "a linear solver such as CG(), or None")
    check_range(tolerance, "tolerance", least=0)
    check_choice(on_failure, ON_FAILURE, "on_failure")

    def wrapped(solve: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any, **named: Any) -> Any:
            given = Form((arguments, named))
            question = Question(
                solve,
                equation,
                objective is not None,
                linear,
                has_aux,
                vectorized,
                tolerance,
                on_failure,
                given,
                autodiff.transformed(),
            )
            return answered(question)

        return update_wrapper(function, solve)

    return wrapped if solve is None else wrapped(solve)
