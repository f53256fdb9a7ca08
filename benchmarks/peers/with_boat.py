"""Hypergradients by BOAT: naive gradient descent, then RAD (unrolled), CG or NS (Neumann)."""

import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.modules import Penalty, Run, Weights
from benchmarks.ridge import CG_RTOL, Problem


def boat(
    model: nn.Module,
    control: Penalty,
    inner: Callable[..., Tensor],
    outer: Callable[..., Tensor],
    **settings: Any,
) -> Run:
    """BOAT on objectives `(upper module, lower module, *lower parameters) -> loss`."""
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


def _boat(
    problem: Problem,
    steps: int,
    operation: str,
    iterations: int,
    rule: Callable = torch.optim.SGD,
) -> Run:
    model = Weights(problem)
    return boat(
        model,
        Penalty(problem),
        lambda upper, _, w: problem.inner(w, upper()),
        lambda upper, _, w: problem.outer(w, upper()),
        optimizer=rule(model.parameters(), lr=problem.step_size),
        steps=steps,
        operation=operation,
        iterations=iterations,
        tolerance=CG_RTOL * problem.outer_slope_size,  # its tolerance is absolute
    )


def unrolled(problem: Problem, steps: int, rule: Callable = torch.optim.SGD) -> Run:
    return _boat(problem, steps, "RAD", 0, rule)


def cg(problem: Problem, steps: int) -> Run:
    return _boat(problem, steps, "CG", 10 * problem.start.numel())


def neumann(problem: Problem, steps: int) -> Run:
    return _boat(problem, steps, "NS", steps)
