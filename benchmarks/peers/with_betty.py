"""Hypergradients by Betty: an iterative inner problem (unrolled), or an implicit one."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.modules import Penalty, Run, Weights
from benchmarks.ridge import Problem


def betty(
    problem: Problem,
    steps: int,
    config: dict[str, Any],
    *,
    iterative: bool = False,
    rule: Callable = torch.optim.SGD,
) -> Run:
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.logging.logger_base import get_logger
    from betty.problems import ImplicitProblem, IterativeProblem

    get_logger().setLevel(logging.ERROR)
    found: list[Tensor] = []

    class Outer(ImplicitProblem):
        def get_batch(self) -> tuple:
            return ()

        def training_step(self, _batch: tuple) -> Tensor:
            (w,) = self.inner.parameters()
            return problem.outer(w, self())

        def custom_optimizer_step(self) -> None:
            # The engine deletes the gradient after the step; here the step is to read it.
            found[:] = [self.module.alpha.grad]

    class Implicit(ImplicitProblem):
        def get_batch(self) -> tuple:
            return ()

        def on_inner_loop_start(self) -> None:
            self.module.w.data.zero_()

        def training_step(self, _batch: tuple) -> Tensor:
            return self(self.outer())

    class Iterative(IterativeProblem):
        def get_batch(self) -> tuple:
            return ()

        def on_inner_loop_start(self) -> None:
            self.params = (problem.start.requires_grad_(),)
            # Its SGD holds on to a momentum buffer, and so to the last graph, at momentum 0 too.
            for state in self.optimizer.state:
                state.pop("momentum_buffer", None)

        def training_step(self, _batch: tuple) -> Tensor:
            return self.fmodule(self.params, self.buffers, self.outer())

    model, control = Weights(problem), Penalty(problem)
    inner = (Iterative if iterative else Implicit)(
        "inner",
        Config(unroll_steps=steps, **config),
        model,
        rule(model.parameters(), lr=problem.step_size),
    )
    outer = Outer(
        "outer",
        Config(first_order=not iterative),
        control,
        torch.optim.SGD(control.parameters(), lr=0.0),
    )
    engine = Engine(
        problems=[outer, inner],
        config=EngineConfig(train_iters=steps),
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )

    def run() -> Tensor:
        engine.run()
        return found[0]

    return run


def unrolled(problem: Problem, steps: int, rule: Callable = torch.optim.SGD) -> Run:
    return betty(problem, steps, {"retain_graph": True}, iterative=True, rule=rule)


def cg(problem: Problem, steps: int) -> Run:
    # It has no tolerance, so it gets the number of iterations that the others need.
    return betty(problem, steps, {"type": "cg", "cg_iterations": problem.cg_iterations})


def neumann(problem: Problem, steps: int) -> Run:
    options = {"neumann_iterations": steps, "neumann_alpha": problem.step_size}
    return betty(problem, steps, {"type": "neumann", **options})
