"""Memory and time of long horizons: multiplier sweeps within a budget against autograd.

Run with `python -m benchmarks.memory [--repeats 5] [--heavy]
[--activation tanh]`. Live bytes are beyond the gradient.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bilevel as bl
from benchmarks.measure import machine, median_ratio, paired_times, peak_live_bytes

MIB = 2**20


ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


def terminal(state: Tensor, control: bl.PerStep) -> Tensor:  # noqa: ARG001
    return (state**2).sum() / 2


def main() -> None:
    """Print time, live bytes and the difference of the gradients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", default="64 MiB")
    parser.add_argument("--heavy", action="store_true", help="256 x 256, T = 300")
    # A float64 tanh costs as much as the product: then half of the time is the forward, and an
    # evaluation repeated weighs more.
    parser.add_argument("--activation", choices=ACTIVATIONS, default="relu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    activation = ACTIVATIONS[arguments.activation]

    def step(state: Tensor, theta: Tensor, t: int) -> Tensor:  # noqa: ARG001
        return activation(state @ theta) + 0.5 * state

    rows, size, horizon = (256, 256, 300) if arguments.heavy else (1024, 64, 1000)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    start = draw(rows, size)
    control = bl.PerStep([draw(size, size) / (2 * size**0.5) for _ in range(horizon)])
    problem = bl.ControlProblem(bl.Map(step), terminal, horizon)

    def plain(segments: int | None) -> list[Tensor]:
        thetas = [theta.clone().requires_grad_() for theta in control.steps]

        def segment(state: Tensor, *part: Tensor) -> Tensor:
            for theta in part:
                state = step(state, theta, 0)
            return state

        if segments is None:
            state = segment(start, *thetas)
        else:
            state, length = start, -(-horizon // segments)
            for a in range(0, horizon, length):
                state = checkpoint(segment, state, *thetas[a : a + length], use_reentrant=False)
        terminal(state, control).backward()
        return [theta.grad for theta in thetas]

    def ours(checkpointing: bl.Checkpointing | bl.Budget) -> list[Tensor]:
        return list(bl.adjoint(problem, start, control, checkpointing=checkpointing).gradient.steps)

    found = bl.measure(problem, start, control)
    budget = bl.Budget(arguments.budget)
    plan = bl.plan(
        horizon,
        budget.bytes,
        found.state_bytes,
        found.graph_bytes,
        working_bytes=found.working_bytes,
    )
    choices: dict[str, Callable[[], list[Tensor]]] = {
        "autograd": lambda: plain(None),
        "torch checkpoint": lambda: plain(round(horizon**0.5)),
        f"MLM, {arguments.budget}": lambda: ours(budget),
        "MLM, states kept": lambda: ours(bl.Checkpointing()),
        "MLM, graphs kept": lambda: ours(bl.Checkpointing(block=None)),
    }
    expected = plain(None)
    gradient = sum(part.nbytes for part in expected)
    times = paired_times(list(choices.values()), arguments.repeats, warm_up=1)
    print(machine())
    print(f"T = {horizon}, state {rows} x {size} float64 = {start.nbytes / MIB:g} MiB")
    print(f"gradient {gradient / MIB:.1f} MiB; measured {found}")
    print(f"{arguments.budget}: {plan}")
    print(f"{'':18} {'median s':>9} {'ratio':>6} {'live MiB':>9} {'difference':>11}")
    for (name, run), timing in zip(choices.items(), times, strict=True):
        # Autograd and torch's checkpoint also hold a copy of theta, which is not counted.
        copies = 0 if name.startswith("MLM") else gradient
        peak = peak_live_bytes(run) - gradient - copies
        difference = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(run(), expected, strict=True)
        )
        print(
            f"{name:18} {timing.median:9.3f} {median_ratio(timing, times[0]):6.2f} "
            f"{peak / MIB:9.1f} {difference:11.1e}"
        )


if __name__ == "__main__":
    main()
