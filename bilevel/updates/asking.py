"""One hypergradient: the problem as a method gets it, what it answers, and how that is judged."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

from bilevel import autodiff, tree
from bilevel.certificates.against_steps import AgainstSteps
from bilevel.certificates.certificate import Certifier
from bilevel.checks import check_kind, check_range
from bilevel.control.kept_sweep import fingerprints
from bilevel.dynamics.per_step import PerStep
from bilevel.dynamics.steps import walk
from bilevel.errors import (
    ArgumentError,
    BilevelError,
    DivergenceError,
    LostGradientError,
    UnsupportedError,
)
from bilevel.inner.batches import refuse_loader, refuse_many
from bilevel.inner.problem import BilevelProblem, Objective
from bilevel.methods.base import Found, HypergradientMethod
from bilevel.methods.instance import Instance, Warm
from bilevel.methods.mlm import MLM
from bilevel.methods.one_step import OneStep
from bilevel.methods.unrolled import Unrolled
from bilevel.optim.given import Given
from bilevel.optim.rules import InnerOptimizer
from bilevel.outer.keep import Keep
from bilevel.parallel import Alone, Averaged, Replicas, refuse_shards, shared
from bilevel.solution import Hypergradient
from bilevel.tree import Tree

FROM_WARM = "the inner steps made from a warm start, which are no fixed function of the control"
CARRIED = 1e-2  # fall of the inner residual from which the steps carry the gradient


class Asking:
    """What `BilevelSolver` asks its method, by these of its fields."""

    problem: BilevelProblem
    optimizer: InnerOptimizer
    inner_steps: int
    method: HypergradientMethod
    certificate: Certifier | None
    replicas: Replicas | None
    micro_batches: int

    def _instance(
        self,
        params: Tree,
        control: Tree,
        inner_batch: Any,
        outer_batch: Any,
        linear_batch: Any = None,
        warm: Warm | None = None,
        inner_tolerance: float | None = None,
    ) -> Instance:
        autodiff.refuse_inside("hypergradient", params, control)
        for name, value in (("params", params), ("control", control)):
            tree.check_leaves(value, name)
            if not any(tree.is_variable(x) for x in tree.leaves_of(value)):
                raise ArgumentError(
                    f"{name} must hold a floating-point or complex tensor, got {value!r}."
                )
        for name, batch in (("inner_batch", inner_batch), ("linear_batch", linear_batch)):
            refuse_loader(batch, name)
        refuse_many(outer_batch, "outer_batch")
        if inner_tolerance is not None:
            check_range(inner_tolerance, "inner_tolerance", above=0)
        if self.problem.outer_each is not None and not self.method.sees_steps:
            raise ArgumentError(
                f"outer_each counts every inner step, which {type(self.method).__name__} as it is "
                "set does not differentiate: take MLM() or Unrolled()."
            )
        if isinstance(control, PerStep):
            raise ArgumentError(
                "the control of a bilevel problem is shared by all inner steps, got a PerStep: "
                "stack what changes with the step, and read it by "
                "ByStep(lambda t: lambda control: control['rates'][t - 1])."
            )
        problem, among = self.problem, self._among
        refuse_shards(params, control, alone=self.replicas is None)
        if among is not None:
            fields = "optimizer", "inner_steps", "method", "certificate"
            settings = {f"solver.{name}": getattr(self, name) for name in fields}
            values = {"params": params, "control": control, "warm": warm and warm.state}
            batches = {"inner": inner_batch, "outer": outer_batch, "linear": linear_batch}
            problem, given = shared(among, problem, settings, values, batches, self.micro_batches)
            inner_batch, outer_batch, linear_batch = given.values()
        return Instance(
            problem,
            self.optimizer,
            1 if isinstance(self.optimizer, Given) else self.inner_steps,
            tree.detach(params),
            tree.detach(control),
            inner_batch,
            outer_batch,
            linear_batch=linear_batch,
            warm=warm,
            inner_tolerance=inner_tolerance,
        )

    @cached_property
    def _among(self) -> Replicas | Alone | None:
        """Those who share the batches; None where nobody does."""
        return Alone() if self.replicas is None and self.micro_batches > 1 else self.replicas

    def _averaged(self, outer: Objective) -> Objective:
        """An outer objective as those who share the batches see it."""
        if self._among is None:
            return outer
        return Averaged(outer, "the outer objective", self._among, self.micro_batches)

    @property
    def _differentiates_steps(self) -> bool:
        return isinstance(self.method, MLM | Unrolled | OneStep)

    def _kept(self, instance: Instance, keep: Keep | None, resume: bool | int) -> Instance:
        """With a sweep that is kept on its way."""
        check_kind(keep, Keep, "keep", "a Keep(folder)")
        assert keep is not None
        if not isinstance(self.method, MLM):
            raise ArgumentError(
                f"keep= keeps the sweep of multipliers, which {type(self.method).__name__} does "
                "not make: take method=MLM(), or keep a whole solve by solve(keep=...)."
            )
        if self.replicas is not None:
            raise UnsupportedError(
                "a sweep is kept by one process: leave replicas= out, or keep= in hypergradient; "
                "solve(keep=...) is kept by all of them, between its updates."
            )
        batches = {
            **fingerprints(instance.inner_batch, "inner_batch"),
            **fingerprints(instance.outer_batch, "outer_batch"),
        }
        conditions = {**keep.conditions, "batches": batches, "micro_batches": self.micro_batches}
        return replace(instance, keep=replace(keep, conditions=conditions), resume=resume)

    def _find(self, instance: Instance) -> Hypergradient:
        instance = self._counted(instance)
        found = self._asked(lambda: [self.method.find(instance)], instance)[0]
        return self._judged(instance, found)

    def _counted(self, instance: Instance) -> Instance:
        """With the number of steps that a tolerance asks for, where they are differentiated."""
        if instance.inner_tolerance is None or not self._differentiates_steps:
            return instance
        steps = _steps_that_carry(instance, instance.inner_tolerance)
        return replace(instance, inner_steps=steps, inner_tolerance=None)

    def _judged(self, instance: Instance, found: Found) -> Hypergradient:
        """The record, with a certificate."""
        norm = tree.norm(found.gradient)
        if not (math.isfinite(float(found.value)) and math.isfinite(norm)):
            raise DivergenceError(
                f"the outer objective is {float(found.value):g} and the norm of the hypergradient "
                f"{norm:g}, although the inner solution is finite: look for a square root or a "
                "division at zero in the objectives, or take a smaller step size."
            )
        certificate = self.certificate and self.certificate.certify(instance, found)
        begun = instance.warm is not None and self.problem.start is None
        if certificate and begun and isinstance(self.certificate, AgainstSteps):
            certificate = replace(certificate, target=FROM_WARM)
        return Hypergradient(
            found.value,
            found.gradient,
            self.optimizer.params(found.warm.state),
            certificate,
            found.warm,
            found.linear,
            found.truncation,
            found.flaw,
        )

    def _asked(self, find: Callable[[], list[Found]], instance: Instance) -> list[Found]:
        """What the method answers; errors say what a reader of this file would know."""
        try:
            answers = find()
        except LostGradientError as error:
            last = (
                isinstance(self.method, OneStep) or getattr(self.method, "last", None) is not None
            )
            if self.problem.start is None or not last:
                raise
            raise LostGradientError(
                f"{error} {type(self.method).__name__} reverses the last inner steps alone and "
                "never comes to the start: learn a start with MLM() or Unrolled()."
            ) from error
        except BilevelError:
            raise
        except Exception as error:
            params, control = (
                tree.map_leaves(tree.kind, value) for value in (instance.params, instance.control)
            )
            error.add_note(
                f"It came from an objective (params, control, batch) with params {params} and "
                f"control {control}: are they in this order?"
            )
            absent = [
                name for name in ("inner", "outer") if getattr(instance, f"{name}_batch") is None
            ]
            if absent and "NoneType" in str(error):
                error.add_note(
                    f"No batch was given for the {' and the '.join(absent)} objective, whose third "
                    "argument is then None: pass inner_batch and outer_batch, or batches= to solve."
                )
            raise
        for found in answers:
            outer = found.outer
            slopes = [] if outer is None else tree.leaves_of((outer.in_params, outer.in_control))
            if slopes and not any(map(tree.is_variable, slopes)):
                raise LostGradientError(
                    "the outer objective depends neither on the params nor on the control in a way "
                    "that can be differentiated: an argmax, a comparison or a detach() cuts it "
                    "off; take a loss that is smooth, such as a cross-entropy for an accuracy."
                )
        return answers


def _steps_that_carry(instance: Instance, tolerance: float) -> int:
    """Inner steps until the residual is within the tolerance, and has fallen to a hundredth."""
    # The steps carry the derivative of where they lead as far as they contract. From a start that
    # is within the tolerance already they would carry nothing, and the residual does not tell.
    first, made, dynamics = math.inf, 0, instance.dynamics
    states = walk(dynamics, instance.observation, instance.control, instance.inner_steps)
    for made, state in enumerate(states):
        if made % 10:
            continue
        params = dynamics.readout(tree.detach(state))
        size = tree.norm(dynamics.residual(params, instance.control, made + 1))
        first = size if not made else first
        if first > tolerance >= size and size <= CARRIED * first:
            break
    return made
