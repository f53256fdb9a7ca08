"""One hypergradient by each peer, through its own documented interface.

Every maker returns a function without arguments that finds the hypergradient once, from the same
start, with the same loss and the same steps. What a peer lets one build once (a problem, an engine,
a decorated solver) is built once, outside the time taken. A peer is imported where it is used.
"""

import logging
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ridge import CG_RTOL, Problem

Run = Callable[[], Tensor]


class Weights(nn.Module):
    """The inner variable as a module whose forward is the inner objective."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem, self.w = problem, nn.Parameter(problem.start)

    def forward(self, alpha: Tensor) -> Tensor:
        return self.problem.inner(self.w, alpha)


class Penalty(nn.Module):
    """The control as a module."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.alpha = nn.Parameter(problem.alpha.clone())

    def forward(self) -> Tensor:
        return self.alpha


def sgd(model: Weights, problem: Problem, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=problem.step_size, **options)


def torch_unrolled(problem: Problem, steps: int) -> Run:
    """A loop over `torch.autograd.grad`."""

    def run() -> Tensor:
        alpha = problem.alpha.detach().requires_grad_()
        w = problem.start.requires_grad_()
        for _ in range(steps):
            (slope,) = torch.autograd.grad(problem.inner(w, alpha), w, create_graph=True)
            w = torch.sub(w, slope, alpha=problem.step_size)
        return torch.autograd.grad(problem.outer(w, alpha), alpha)[0]

    return run


def torch_implicit(problem: Problem, steps: int) -> Run:
    """A loop that keeps no graph, and conjugate gradients on products through one kept graph."""

    def run() -> Tensor:
        w = problem.start
        for _ in range(steps):
            w.requires_grad_()
            (slope,) = torch.autograd.grad(problem.inner(w, problem.alpha), w)
            w = torch.sub(w.detach(), slope, alpha=problem.step_size)
        alpha, w = problem.alpha.detach().requires_grad_(), w.requires_grad_()
        (b,) = torch.autograd.grad(problem.outer(w, alpha), w)
        (slope,) = torch.autograd.grad(problem.inner(w, alpha), w, create_graph=True)
        x, r, p, size = torch.zeros_like(b), b, b, float(b @ b)
        enough = CG_RTOL**2 * size
        while size > enough:
            (product,) = torch.autograd.grad(slope, w, p, retain_graph=True)
            scale = size / float(p @ product)
            x, r = torch.add(x, p, alpha=scale), torch.sub(r, product, alpha=scale)
            size, before = float(r @ r), size
            p = torch.add(r, p, alpha=size / before)
        return -torch.autograd.grad(slope, alpha, x)[0]

    return run


def higher_unrolled(problem: Problem, steps: int, **options: Any) -> Run:
    import higher

    model = Weights(problem)
    optimizer = sgd(model, problem, **options)

    def run() -> Tensor:
        alpha = problem.alpha.detach().requires_grad_()
        with higher.innerloop_ctx(model, optimizer) as (functional, differentiable):
            for _ in range(steps):
                differentiable.step(functional(alpha))
            (w,) = functional.parameters()
            return torch.autograd.grad(problem.outer(w, alpha), alpha)[0]

    return run


def torchopt_unrolled(problem: Problem, steps: int, rule: Callable | None = None) -> Run:
    import torchopt

    rule = rule or torchopt.sgd

    def run() -> Tensor:
        alpha = problem.alpha.detach().requires_grad_()
        params = (problem.start.requires_grad_(),)
        optimizer = torchopt.FuncOptimizer(rule(lr=problem.step_size))
        for _ in range(steps):
            params = optimizer.step(problem.inner(params[0], alpha), params)
        return torch.autograd.grad(problem.outer(params[0], alpha), alpha)[0]

    return run


def _torchopt_implicit(problem: Problem, steps: int, linear_solver: Callable) -> Run:
    import torchopt

    stationary = torch.func.grad(lambda w, alpha: problem.inner(w, alpha))

    @torchopt.diff.implicit.custom_root(stationary, argnums=1, solve=linear_solver)
    def solve(start: Tensor, alpha: Tensor) -> Tensor:
        w = start
        for _ in range(steps):
            with torch.enable_grad():
                w = w.detach().requires_grad_()
                (slope,) = torch.autograd.grad(problem.inner(w, alpha), w)
            w = torch.sub(w.detach(), slope, alpha=problem.step_size)
        return w

    def run() -> Tensor:
        alpha = problem.alpha.detach().requires_grad_()
        return torch.autograd.grad(problem.outer(solve(problem.start, alpha), alpha), alpha)[0]

    return run


def torchopt_cg(problem: Problem, steps: int) -> Run:
    import torchopt

    return _torchopt_implicit(problem, steps, torchopt.linear_solve.solve_cg(rtol=CG_RTOL))


def torchopt_neumann(problem: Problem, steps: int) -> Run:
    import torchopt

    series = torchopt.linear_solve.solve_inv(ns=True, maxiter=steps, alpha=problem.step_size)
    return _torchopt_implicit(problem, steps, series)


def boat(
    model: nn.Module,
    control: Penalty,
    inner: Callable[..., Tensor],
    outer: Callable[..., Tensor],
    **settings: Any,
) -> Run:
    """BOAT on objectives `(upper, *lower parameters) -> loss` of any two modules."""
    import boat_torch

    def named(objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(_feed: dict, upper: Penalty, lower: nn.Module, params: Any = None) -> Tensor:
            return objective(upper, lower, *(lower.parameters() if params is None else params))

        return loss

    config = {
        "gm_op": ["NGD"],
        "na_op": [settings["operation"]],
        "fo_op": None,
        "lower_level_model": model,
        "upper_level_model": control,
        "lower_level_var": list(model.parameters()),
        "upper_level_var": list(control.parameters()),
        "lower_level_opt": settings["optimizer"],
        "upper_level_opt": torch.optim.SGD(control.parameters(), lr=0.0),
        "lower_iters": settings["steps"],
        "device": "cpu",
        "loss_log_path": os.devnull,
        "accumulate_grad": False,
        "copy_last_param": False,
        "return_grad": True,
        "GDA": {"alpha_init": 0.0, "alpha_decay": 0.5},
        "RGT": {"truncate_iter": 0},
        "CG": {"k": settings["iterations"], "tolerance": settings["tolerance"]},
    }
    # It takes objectives by the name of a module and of a function in it.
    objectives = types.ModuleType("boat_objectives")
    objectives.inner, objectives.outer = named(inner), named(outer)
    sys.modules[objectives.__name__] = objectives
    losses = {
        f"{level}_level_loss": {"function": f"{objectives.__name__}.{name}", "params": {}}
        for level, name in (("lower", "inner"), ("upper", "outer"))
    }
    solver = boat_torch.Problem(config, losses).build_ll_solver().build_ul_solver()

    def run() -> Tensor:
        control.alpha.grad = None
        solver.loss_history.clear()  # else it writes an ever longer history at every call
        solver.run_iter({}, {}, 0)
        return control.alpha.grad

    return run


def _boat(problem: Problem, steps: int, operation: str, iterations: int, **options: Any) -> Run:
    model = Weights(problem)
    return boat(
        model,
        Penalty(problem),
        lambda upper, _, w: problem.inner(w, upper()),
        lambda upper, _, w: problem.outer(w, upper()),
        optimizer=sgd(model, problem, **options),
        steps=steps,
        operation=operation,
        iterations=iterations,
        tolerance=CG_RTOL * problem.outer_slope_size,  # its tolerance is absolute
    )


def boat_unrolled(problem: Problem, steps: int, **options: Any) -> Run:
    return _boat(problem, steps, "RAD", 0, **options)


def boat_cg(problem: Problem, steps: int) -> Run:
    return _boat(problem, steps, "CG", 10 * problem.start.numel())


def boat_neumann(problem: Problem, steps: int) -> Run:
    return _boat(problem, steps, "NS", steps)


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


def betty_unrolled(problem: Problem, steps: int, rule: Callable = torch.optim.SGD) -> Run:
    return betty(problem, steps, {"retain_graph": True}, iterative=True, rule=rule)


def betty_cg(problem: Problem, steps: int) -> Run:
    # It has no tolerance, so it gets the number of iterations that the others need.
    return betty(problem, steps, {"type": "cg", "cg_iterations": problem.cg_iterations})


def betty_neumann(problem: Problem, steps: int) -> Run:
    options = {"neumann_iterations": steps, "neumann_alpha": problem.step_size}
    return betty(problem, steps, {"type": "neumann", **options})
