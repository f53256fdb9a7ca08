"""The van der Pol oscillator brought towards rest with little force: optimal control.

One step is the classical Runge-Kutta method; the control u(t) is constant on a step. Run it whole
with `python examples/optimal_control.py`, or cell by cell in an editor that knows `# %%`.
"""

# %% The dynamics: a plain function of the state, the control of the step, and the step's number
import torch
from torch import Tensor

import bilevel as bl

N_STEPS, DURATION = 20, 2.0
DT = DURATION / N_STEPS


def field(x: Tensor, u: Tensor) -> Tensor:
    """Time derivative of position, velocity and the cost spent so far."""
    spent = (x[0] ** 2 + x[1] ** 2 + u**2) / 2
    return torch.stack([x[1], (1 - x[0] ** 2) * x[1] - x[0] + u, spent])


def runge_kutta(x: Tensor, u: Tensor, _t: int) -> Tensor:
    """One step of length DT; the oscillator does not depend on the time itself."""
    k1 = field(x, u)
    k2 = field(x + DT / 2 * k1, u)
    k3 = field(x + DT / 2 * k2, u)
    k4 = field(x + DT * k3, u)
    return x + DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def terminal(x: Tensor, _control: bl.PerStep) -> Tensor:
    """The third state has gathered the cost along the way."""
    return x[2]


# %% The problem, and Algorithm 2 with L-BFGS
problem = bl.ControlProblem(bl.Map(runge_kutta), terminal, N_STEPS)
start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
rest = bl.PerStep([torch.zeros((), dtype=torch.float64) for _ in range(N_STEPS)])

solver = bl.ControlSolver(
    problem,
    optimizer=lambda leaves: torch.optim.LBFGS(
        leaves,
        max_iter=200,
        tolerance_grad=1e-10,
        tolerance_change=1e-15,
        history_size=20,
        line_search_fn="strong_wolfe",
    ),
)
solution = solver.solve(rest, start, steps=2, tolerance=1e-7)
cost, swept = solution.cost, solution.adjoint
print(f"cost {solution.costs[0]:.6f} without force, {cost:.12f} with the best one")
print(f"gradient norm {solution.gradient_norm:.1e}, converged: {solution.converged}")

# %% The optimality conditions (5a), (5b) and (5c), evaluated anew at the point found
residuals = bl.kkt(problem, start, solution.control, swept.states, swept.multipliers)
print(f"dynamics {residuals.feasibility:.1e}")
print(f"multipliers {residuals.costate:.1e}")
print(f"stationarity {residuals.stationarity:.1e}")

# %% What a multiplier is: lambda_t = -dJ/du(t). Push the state at time t and run on from there.


def cost_from(t: int, x: Tensor) -> float:
    """J if the state at time t is x, with the controls found."""
    for k in range(t, N_STEPS):
        x = runge_kutta(x, solution.control.steps[k], k + 1)
    return float(x[2])


PUSH = 1e-5
multiplier_error = 0.0
for t, (state, multiplier) in enumerate(zip(swept.states, swept.multipliers, strict=True)):
    for i, push in enumerate(PUSH * torch.eye(3, dtype=torch.float64)):
        slope = (cost_from(t, state + push) - cost_from(t, state - push)) / (2 * PUSH)
        multiplier_error = max(multiplier_error, abs(slope + float(multiplier[i])))
print(f"largest difference of a multiplier from -dJ/du(t): {multiplier_error:.1e}")
