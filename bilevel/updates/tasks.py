"""The hypergradient of an update: of one task, of some in turn, or of some side by side."""

from dataclasses import dataclass, replace
from typing import Any, Self

from bilevel import tree
from bilevel.checks import check_kind, check_whole
from bilevel.control.kept_sweep import check_within, inside
from bilevel.errors import ArgumentError
from bilevel.methods.instance import Instance, Warm
from bilevel.methods.mlm import MLM
from bilevel.outer.keep import Keep
from bilevel.solution import Hypergradient
from bilevel.tasks.problem import Evaluation, Vmapped
from bilevel.tasks.stacked import copies, side_by_side, stacked
from bilevel.tree import Tree
from bilevel.updates.accumulated import mean_of
from bilevel.updates.asking import Asking


@dataclass(frozen=True)
class Tasks:
    """The tasks of one update: one, some in turn, or some side by side."""

    solver: Asking
    params: Tree
    linear_batch: Any
    accumulate: int
    together: bool = False
    keep: Keep | None = None

    @classmethod
    def of(
        cls,
        solver: Asking,
        params: Tree,
        linear_batch: Any,
        accumulate: int,
        evaluate: Evaluation | None,
        batched: bool,
        keep: Keep | None,
    ) -> Self:
        """How the tasks of an update are evaluated."""
        if solver.replicas is not None or not isinstance(solver.method, MLM):
            check_within(keep, f"{type(solver.method).__name__} or replicas")
        check_whole(accumulate, "accumulate", 1)
        check_kind(evaluate, Evaluation | None, "evaluate", "Vmapped() or Looped()")
        if accumulate > 1 and not batched:
            raise ArgumentError(
                f"accumulate={accumulate} needs batches, one a task: pass batches=[(inner_batch, "
                "outer_batch), ...], or leave it at 1."
            )
        if accumulate == 1 or not isinstance(evaluate, Vmapped):
            return cls(solver, params, linear_batch, accumulate, keep=keep)
        if solver._among is not None:
            raise ArgumentError(
                "tasks that Vmapped() stacks are no samples of a batch, which replicas and "
                "micro_batches split: pass evaluate=Looped()."
            )
        problem = side_by_side(solver.problem, solver.optimizer, accumulate, evaluate)
        batch = None if linear_batch is None else stacked([linear_batch] * accumulate)
        params = copies(tree.detach(params), accumulate)
        alone: Any = solver  # a dataclass, `BilevelSolver`
        return cls(replace(alone, problem=problem), params, batch, accumulate, True, keep)

    def found(
        self, control: Tree, batch: Any, warm: Warm | None, tolerance: float | None, step: int
    ) -> Hypergradient:
        """The hypergradient of an update."""
        pairs = [batch or (None, None)] if self.accumulate == 1 else batch
        if self.together:
            pairs = [(stacked([inner for inner, _ in pairs]), stacked([x for _, x in pairs]))]
        solver, given = self.solver, (self.linear_batch, warm, tolerance)
        instances = (
            solver._instance(self.params, control, inner, outer, *given) for inner, outer in pairs
        )
        kept = (self._kept(instance, (step, i)) for i, instance in enumerate(instances))
        return mean_of([solver._find(instance) for instance in kept])

    def _kept(self, instance: Instance, place: tuple[int, int]) -> Instance:
        """With a sweep that is kept, where that was asked for."""
        if self.keep is None or self.keep.within is None:
            return instance
        batches = {"inner": instance.inner_batch, "outer": instance.outer_batch}
        given = {"observation": instance.observation, "control": instance.control, **batches}
        return replace(instance, **inside(self.keep, place, **given))
