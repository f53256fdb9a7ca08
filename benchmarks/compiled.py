"""The sweeps with a compiled step against the same sweeps with the plain step.

Run with `python -m benchmarks.compiled [--repeats 7]`.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

import bilevel as bl
from benchmarks.measure import machine, median_ratio, paired_times

Step = Callable[[Tensor, Tensor, int], Tensor]


def chain(state: Tensor, control: Tensor, _t: int) -> Tensor:
    """Eight small pointwise moves: some forty operations."""
    for _ in range(8):
        state = state + 0.1 * torch.sin(control * state) * torch.exp(-state * state)
    return state


def oscillator(state: Tensor, control: Tensor, _t: int) -> Tensor:
    """Van der Pol's, one step of Runge and Kutta's method, on the two rows of the state."""

    def field(x: Tensor) -> Tensor:
        return torch.stack((x[1], (1 - x[0] ** 2) * x[1] - x[0] + control))

    h = 0.1
    a = field(state)
    b = field(state + h / 2 * a)
    c = field(state + h / 2 * b)
    return state + h / 6 * (a + 2 * b + 2 * c + field(state + h * c))


def layer(state: Tensor, control: Tensor, _t: int) -> Tensor:
    """One matrix product and one pointwise operation."""
    return torch.tanh(control @ state)


def cases() -> dict[str, tuple[Step, Tensor, Tensor, int]]:
    """Step, initial state, control and horizon, by name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    half = torch.tensor(0.5)
    return {
        "Runge-Kutta, 2 numbers": (oscillator, normal(2), half, 20),
        "Runge-Kutta, 2 x 100 000": (oscillator, normal(2, 100_000), half, 20),
        "chain, 1000 numbers": (chain, normal(1000), half, 20),
        "chain, 100 000": (chain, normal(100_000), half, 20),
        "chain, 1 000 000": (chain, normal(1_000_000), half, 5),
        "matrix product, 256 x 256": (layer, normal(256, 256), normal(256, 256) / 16, 20),
    }


def main() -> None:
    """Print the times, their ratio, the wait for the compiler and the difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    print("| step | plain ms | compiled ms | ratio | first sweep s | relative difference |")
    print("|---|---|---|---|---|---|")
    for name, (step, start, control, horizon) in cases().items():

        def gradient(
            dynamics: bl.Dynamics,
            start: Tensor = start,
            control: Tensor = control,
            n: int = horizon,
        ) -> Tensor:
            problem = bl.ControlProblem(dynamics, lambda u, _theta: u.square().mean(), n)
            return bl.adjoint(problem, start, control).gradient

        plain, compiled = bl.Map(step), bl.Compiled(bl.Map(step))
        began = time.perf_counter()
        found = gradient(compiled)
        first = time.perf_counter() - began
        truth = gradient(plain)
        difference = float((found - truth).norm() / truth.norm())
        runs = [lambda d=d, run=gradient: run(d) for d in (plain, compiled)]
        slow, fast = paired_times(runs, arguments.repeats)
        print(
            f"| {name} | {1e3 * slow.median:.1f} | {1e3 * fast.median:.1f} "
            f"| {median_ratio(fast, slow):.2f} | {first:.1f} | {difference:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
