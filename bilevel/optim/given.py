"""Inner solutions that come from elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch

from bilevel import tree
from bilevel.checks import check_arguments, check_kind
from bilevel.errors import ArgumentError, DivergenceError, StructureError, UnsupportedError
from bilevel.optim.rules import InnerOptimizer, Ranges
from bilevel.tree import Tree

Solve = Callable[[Tree, Tree, Any], Tree]  # (params, control, batch) -> params


@final
@dataclass(frozen=True)
class Given(InnerOptimizer):
    """A solver of the inner problem, by any means, in the place of an inner optimiser.

    SciPy, scikit-learn, a simulator: `solve(params, control, batch)` returns the inner solution.
    It gets plain tensors without grad, the params of the last solution to start from, and is called
    once a hypergradient. Its steps are nobody's to reverse: the hypergradient is that of
    `Implicit`, at the solution, and the certificate tells how good that is.

    Attributes:
        solve: it.
        rule: whose fixed point the solution is, where that is not the point at which the gradient
            of the inner objective, or its residual, is zero: `ProximalGradient(lr, L1(...))` for an
            objective with a penalty, `SGD(weight_decay=...)` for one with a decay. It makes no
            step.

    Raises:
        ArgumentError: if `solve` is no function of these three, or `rule` no inner optimiser.

    Example:
        >>> import bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2 + w**2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> third = Given(lambda w, a, batch: a / 3)
        >>> solver = bl.BilevelSolver(problem, third, method=bl.Implicit())
        >>> solver.hypergradient(torch.tensor(0.0), torch.tensor(0.0)).gradient
        tensor(-0.6667)
    """

    ranges: ClassVar[Ranges] = {}
    reversible: ClassVar[bool] = False
    of_roots: ClassVar[bool] = True
    solve: Solve
    rule: InnerOptimizer | None = None

    def __post_init__(self) -> None:
        if not callable(self.solve):
            raise ArgumentError(
                "solve must be a function of (params, control, batch) that returns params, got "
                f"{tree.kind(self.solve)}."
            )
        check_arguments(self.solve, "solve", "params", "control", "batch")
        wanted = "a rule such as ProximalGradient(lr, prox), or None"
        check_kind(self.rule, InnerOptimizer | None, "rule", wanted)
        if self.rule is not None:  # what it says of the residual is said of this one's
            object.__setattr__(self, "symmetric", self.rule.symmetric)

    def step(  # noqa: D102
        self,
        state: Tree,
        gradient: Callable[[Tree], Tree],  # noqa: ARG002
        control: Tree,
        batch: Any,
        t: int,  # noqa: ARG002
    ) -> Tree:
        with torch.enable_grad():  # for solvers that differentiate by themselves
            found = self.solve(tree.copied(tree.detach(state)), tree.detach(control), batch)
        if found is None:
            raise StructureError(
                "solve must return params like those given, got None: is a return missing?"
            )
        tree.check_leaves(found, "params")
        found = tree.copied(tree.detach(found))
        tree.check_like(found, state, "params", "solve must return params like those given")
        names = tree.leaf_names(found, "params")
        for name, x in zip(names, tree.leaves_of(found), strict=True):
            if tree.is_variable(x) and not bool(x.isfinite().all()):
                bad = int((~x.isfinite()).sum())
                raise DivergenceError(
                    f"solve returned {bad} of {x.numel()} entries of {name} that are not finite: "
                    "look at what it was given, its step size, and whether there is a solution."
                )
        return found

    def update(self, state: Tree, gradient: Tree, control: Tree, t: int) -> Tree:  # noqa: ARG002
        """There is none."""
        raise UnsupportedError(
            "Given has no inner steps to make one by one: it is called for the whole solution."
        )

    def residual(self, params: Tree, gradient: Tree, control: Tree, t: int) -> Tree:
        """That of the rule, or the gradient."""
        if self.rule is None:
            return gradient
        return self.rule.residual(params, gradient, control, t)

    def on_kink(self, params: Tree, gradient: Tree, control: Tree, t: int) -> bool:  # noqa: D102
        return self.rule is not None and self.rule.on_kink(params, gradient, control, t)

    def check(self, params: Tree, control: Tree, t: int) -> None:  # noqa: D102
        if self.rule is not None:
            self.rule.check(params, control, t)

    @property
    def residual_is_gradient(self) -> bool:  # noqa: D102
        return self.rule is None or self.rule.residual_is_gradient

    def scaled(self, factor: float) -> Self:  # noqa: ARG002
        """There is nothing to scale."""
        raise UnsupportedError("Given has no learning rate to scale: take a rule of steps.")
