"""One training step of the MRI network: multiplier sweep against plain autograd.

Run with `python -m benchmarks.training_step [--preset narrow|paper] [--size 128] [--repeats 7]`.
"""

import argparse

import torch

import bilevel as bl
from applications.mri.network.architecture import narrow, paper
from applications.mri.network.reconstruction import Loss, Network
from applications.mri.physics.operators import ifft2c
from applications.mri.sampling import CartesianRandom
from applications.mri.simulation.anatomy import load_anatomies, resize
from applications.mri.simulation.simulate import simulate
from benchmarks.measure import machine, median_ratio, paired_times, peak_live_bytes


def main() -> None:
    """Print time, live bytes and the difference of the gradients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=("narrow", "paper"), default="narrow")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    generator = torch.Generator().manual_seed(0)
    image = resize(load_anatomies()["brain_t1_axial"][5], arguments.size).clamp(0, 1)
    one = simulate(image, 8, generator)
    mask = CartesianRandom(4.0, 0.08).mask((arguments.size, arguments.size), generator)
    network = Network({"narrow": narrow, "paper": paper}[arguments.preset](8))
    control = network.controls()
    scan = network.prepare(one.kspace[None], mask)
    problem, start = network.training_problem(
        scan, ifft2c(one.kspace)[None], one.reference[None], Loss()
    )

    def autograd() -> list[torch.Tensor]:
        leaves = {}

        def own(part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            mine = {name: value.clone().requires_grad_() for name, value in part.items()}
            leaves.update({id(value): value for value in mine.values()})
            return mine

        theta = bl.PerStep([own(step) for step in control.steps], own(control.initial))
        state = problem.dynamics.init(start, theta.initial)
        cost = torch.zeros(())
        for t in range(1, problem.horizon + 1):
            cost = cost + problem.running(state, theta.steps[t - 1], t)
            state = problem.dynamics.step(state, theta.steps[t - 1], t)
        cost = cost + problem.terminal(state, theta)
        cost.backward()
        return [leaf.grad for leaf in leaves.values()]

    def multipliers(checkpointing: bl.Checkpointing) -> list[torch.Tensor]:
        gradient = bl.adjoint(problem, start, control, checkpointing=checkpointing).gradient
        parts = [*gradient.steps, gradient.initial]
        return [value for part in parts for value in part.values()]

    choices = {
        "autograd": autograd,
        "MLM, states kept": lambda: multipliers(bl.Checkpointing()),
        "MLM, graphs kept": lambda: multipliers(bl.Checkpointing(block=None)),
    }
    expected = autograd()
    times = paired_times(list(choices.values()), arguments.repeats)
    base = peak_live_bytes(autograd)
    print(machine())
    size = f"{arguments.size} x {arguments.size}"
    print(f"{arguments.preset}, 8 coils, {size}, T = {problem.horizon}")
    print(f"{'':18} {'median s':>9} {'ratio':>6} {'peak MiB':>9} {'ratio':>6} {'difference':>11}")
    for (name, run), timing in zip(choices.items(), times, strict=True):
        peak = peak_live_bytes(run)
        difference = max(
            float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
            for a, b in zip(run(), expected, strict=True)
        )
        print(
            f"{name:18} {timing.median:9.3f} {median_ratio(timing, times[0]):6.2f} "
            f"{peak / 2**20:9.1f} {peak / base:6.2f} {difference:11.1e}"
        )


if __name__ == "__main__":
    main()
