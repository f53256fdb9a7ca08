"""Optimal control: the Riccati optimiser against mpc.pytorch, crocoddyl, and IPOPT by casadi.

A linear-quadratic regulator (8 states, 2 controls, 100 steps), alone and in batches, and the van
der Pol oscillator (20 steps). Each peer is imported where it is used and left out if it is missing;
each finds the same optimum, which is checked. Times are medians of solves in turn, from the same
start, one thread.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import bilevel as bl
from benchmarks.measure import machine, paired_times, save, show

F64 = torch.float64
N, M, T = 8, 2, 100
Solved = tuple[float, int]  # cost (of the first problem), iterations


def regulator() -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, as far from stable as a regulator is wanted for: the largest eigenvalue is 1."""
    random = torch.Generator().manual_seed(0)
    A = torch.eye(N, dtype=F64) + 0.1 * torch.randn(N, N, dtype=F64, generator=random)
    B = torch.randn(N, M, dtype=F64, generator=random)
    return A / torch.linalg.eigvals(A).abs().max(), B


A, B = regulator()


def starts(n: int) -> torch.Tensor:
    return torch.randn(n, N, dtype=F64, generator=torch.Generator().manual_seed(1))


def lqr_by_riccati(n: int) -> Callable[[], Solved]:
    problem = bl.ControlProblem(
        bl.Map(lambda x, u, t: A @ x + B @ u),
        lambda x, control: 5 * x @ x,
        T,
        lambda x, u, t: (x @ x + 0.1 * u @ u) / 2,
    )
    solver = bl.ControlSolver(problem, bl.Riccati(batched=n > 1))
    lead = (n,) if n > 1 else ()
    control = bl.PerStep([torch.zeros(*lead, M, dtype=F64) for _ in range(T)])
    start = starts(n) if n > 1 else starts(1)[0]

    def solve() -> Solved:
        found: Any = solver.solve(control, start)
        if n > 1:
            return float(found.cost[0]), int(found.steps.max())
        return found.cost, found.steps

    return solve


def lqr_by_mpc(n: int) -> Callable[[], Solved]:
    from mpc import mpc

    # Its horizon counts states, and each has a control: the last one costs and does nothing.
    C = torch.diag(torch.cat([torch.ones(N), 0.1 * torch.ones(M)]).to(F64))
    last = torch.diag(torch.cat([10 * torch.ones(N), 0.1 * torch.ones(M)]).to(F64))
    costs = torch.cat([C.expand(T, -1, -1), last.unsqueeze(0)])
    costs = costs.unsqueeze(1).expand(T + 1, n, N + M, N + M).contiguous()
    linear = torch.zeros(T + 1, n, N + M, dtype=F64)
    F = torch.cat([A, B], 1).expand(T, n, N, N + M).contiguous()
    settings = {"lqr_iter": 1, "verbose": -1, "exit_unconverged": False, "backprop": False}
    solver = mpc.MPC(N, M, T + 1, n_batch=n, **settings)
    start = starts(n)

    def solve() -> Solved:
        *_, cost = solver(start, mpc.QuadCost(costs, linear), mpc.LinDx(F))
        return float(cost[0]), 1

    return solve


def lqr_by_crocoddyl(_n: int) -> Callable[[], Solved]:
    import crocoddyl
    import numpy as np

    zero = np.zeros((N, M))
    a, b, start = A.numpy(), B.numpy(), starts(1)[0].numpy()
    nothing = np.zeros(N), np.zeros(N), np.zeros(M)
    running = crocoddyl.ActionModelLQR(a, b, np.eye(N), 0.1 * np.eye(M), zero, *nothing)
    terminal = crocoddyl.ActionModelLQR(a, b, 10 * np.eye(N), 0.1 * np.eye(M), zero, *nothing)
    problem = crocoddyl.ShootingProblem(start, [running] * T, terminal)

    def solve() -> Solved:
        solver = crocoddyl.SolverDDP(problem)
        solver.solve([start] * (T + 1), [np.zeros(M)] * T, 100)
        return solver.cost, solver.iter

    return solve


def ipopt(step: Any, cost: Any, end: Any, start: Any, sizes: tuple[int, int, int]) -> Any:
    """Multiple shooting with exact derivatives."""
    import casadi as ca

    n, m, horizon = sizes
    X, U = ca.SX.sym("x", n, horizon + 1), ca.SX.sym("u", m, horizon)
    J = end(X[:, horizon]) + sum(cost(X[:, t], U[:, t]) for t in range(horizon))
    gaps = [X[:, 0] - start]
    gaps += [X[:, t + 1] - step(X[:, t], U[:, t]) for t in range(horizon)]
    variables = ca.vertcat(ca.vec(X), ca.vec(U))
    quiet = {"print_time": 0, "ipopt.print_level": 0, "ipopt.sb": "yes", "ipopt.tol": 1e-12}
    problem = {"x": variables, "f": J, "g": ca.vertcat(*gaps)}
    solver = ca.nlpsol("solver", "ipopt", problem, quiet)

    def solve() -> Solved:
        found = solver(x0=0, lbg=0, ubg=0)
        return float(found["f"]), int(solver.stats()["iter_count"])

    return solve


def lqr_by_ipopt(_n: int) -> Callable[[], Solved]:
    import casadi as ca

    a, b, start = (ca.DM(x.numpy()) for x in (A, B, starts(1)[0]))
    return ipopt(
        lambda x, u: a @ x + b @ u,
        lambda x, u: (ca.dot(x, x) + 0.1 * ca.dot(u, u)) / 2,
        lambda x: 5 * ca.dot(x, x),
        start,
        (N, M, T),
    )


STEPS, DT = 20, 0.1


def runge_kutta(field: Any, x: Any, u: Any) -> Any:
    k1 = field(x, u)
    k2 = field(x + DT / 2 * k1, u)
    k3 = field(x + DT / 2 * k2, u)
    k4 = field(x + DT * k3, u)
    return x + DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def oscillator(stack: Any, x: Any, u: Any) -> Any:
    cost = (x[0] ** 2 + x[1] ** 2 + u**2) / 2
    return stack(x[1], (1 - x[0] ** 2) * x[1] - x[0] + u, cost)


def van_der_pol_by_riccati(_n: int) -> Callable[[], Solved]:
    def field(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return oscillator(lambda *parts: torch.stack(parts), x, u)

    problem = bl.ControlProblem(
        bl.Map(lambda x, u, t: runge_kutta(field, x, u)), lambda x, control: x[2], STEPS
    )
    control = bl.PerStep([torch.zeros((), dtype=F64) for _ in range(STEPS)])
    start = torch.tensor([1.0, 0.0, 0.0], dtype=F64)

    def solve() -> Solved:
        found: Any = bl.ControlSolver(problem, bl.Riccati()).solve(control, start)
        return found.cost, found.steps

    return solve


def van_der_pol_by_ipopt(_n: int) -> Callable[[], Solved]:
    import casadi as ca

    def step(x: Any, u: Any) -> Any:
        return runge_kutta(lambda x, u: oscillator(ca.vertcat, x, u), x, u)

    start = ca.DM([1, 0, 0])
    return ipopt(step, lambda x, u: 0, lambda x: x[2], start, (3, 1, STEPS))


def van_der_pol_by_crocoddyl(_n: int) -> Callable[[], Solved]:
    """Its model is written in Python here, with derivatives by casadi: its time is not its own."""
    import casadi as ca
    import crocoddyl
    import numpy as np

    # The cost is a stage's, so that its Gauss-Newton has something to go by: the exact second
    # derivatives of the increment of the third state.
    x, u = ca.SX.sym("x", 3), ca.SX.sym("u", 1)
    following = runge_kutta(lambda x, u: oscillator(ca.vertcat, x, u), x, u)
    z, J = ca.vertcat(x, u), following[2] - x[2]
    H, g = ca.hessian(J, z)
    every = ca.Function("f", [x, u], [following, J, ca.jacobian(following, z), g, H])

    class Model(crocoddyl.ActionModelAbstract):
        def __init__(self, *, last: bool = False) -> None:
            super().__init__(crocoddyl.StateVector(3), 1, 0)
            self._last = last

        def calc(self, data: Any, x: Any, u: Any = None) -> None:
            if self._last or u is None:
                data.xnext, data.cost = x, 0.0
                return
            found = every(x, u)
            data.xnext, data.cost = np.array(found[0]).ravel(), float(found[1])

        def calcDiff(self, data: Any, x: Any, u: Any = None) -> None:  # noqa: N802
            if self._last or u is None:
                return
            _, _, F, g, H = (np.array(part) for part in every(x, u))
            data.Fx, data.Fu = F[:, :3], F[:, 3]
            data.Lx, data.Lu = g[:3, 0], g[3:, 0]
            data.Lxx, data.Lxu, data.Luu = H[:3, :3], H[:3, 3], H[3:, 3:]

    start = np.array([1.0, 0.0, 0.0])
    models = [Model() for _ in range(STEPS)]
    problem = crocoddyl.ShootingProblem(start, models, Model(last=True))

    def solve() -> Solved:
        solver = crocoddyl.SolverDDP(problem)
        solver.th_stop = 1e-18
        solver.solve([start] * (STEPS + 1), [np.zeros(1)] * STEPS, 100)
        return solver.cost, solver.iter

    return solve


ROWS = {
    "LQR": [
        ("bilevel Riccati", lqr_by_riccati, (1, 64, 1024)),
        ("mpc.pytorch", lqr_by_mpc, (1, 64, 1024)),
        ("crocoddyl", lqr_by_crocoddyl, (1,)),
        ("IPOPT", lqr_by_ipopt, (1,)),
    ],
    "van der Pol": [
        ("bilevel Riccati", van_der_pol_by_riccati, (1,)),
        ("crocoddyl (model in Python)", van_der_pol_by_crocoddyl, (1,)),
        ("IPOPT", van_der_pol_by_ipopt, (1,)),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64, 1024])
    parser.add_argument(
        "--cpu", action="store_true", help="processor time, where others compute too"
    )
    parser.add_argument("--json", help="write the figures here")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    rows: list[dict[str, object]] = []
    for problem, peers in ROWS.items():
        for n in chosen.batches:
            made = []
            for name, make, sizes in peers:
                if n not in sizes:
                    continue
                try:
                    made.append((name, make(n)))
                except ImportError as error:
                    print(f"{name} is left out: {error}")
            clock = time.process_time if chosen.cpu else time.perf_counter
            times = paired_times([run for _, run in made], chosen.repeats, clock=clock)
            least = min((run()[0] for _, run in made), default=0.0)
            for (name, run), timing in zip(made, times, strict=True):
                cost, iterations = run()
                rows.append(
                    {
                        "problem": problem,
                        "solver": name,
                        "batch": n,
                        "iterations": iterations,
                        "ms a problem": 1e3 * timing.median / n,
                        "cost": f"{cost:.10f}",
                        "above the least": cost - least,
                    }
                )
    show(rows)
    save(chosen.json, {"rows": rows})


if __name__ == "__main__":
    main()
