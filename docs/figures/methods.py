"""Error of each method's hypergradient against inner steps and against time, on one ridge problem.

`python docs/figures/methods.py` draws docs/figures/methods.svg, in the colours of the page.
"""

import re
import statistics
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

import bilevel as bl

N, D, REPEATS = 60, 20, 5
STEPS = (5, 10, 20, 40, 80, 160, 320, 640)
INK, PALE = "#010203", "#040506"  # become colours of the page
COLOURS = ("#3b82c4", "#d9731a", "#3a9d5d", "#c0508f", "#8a63c9")

generator = torch.Generator().manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


scales = torch.linspace(0.35, 1.6, D, dtype=torch.float64)
truth = draw(D)
train_x, validation_x = draw(N, D) * scales, draw(N, D) * scales
train_y, validation_y = (
    x @ truth + 0.5 * draw(N) for x in (train_x, validation_x)
)


def ridge(w: torch.Tensor, decay: torch.Tensor, _batch: object) -> torch.Tensor:
    """Mean squared error and a decay for each weight."""
    return (train_x @ w - train_y).square().mean() / 2 + (
        decay.exp() * w**2
    ).sum() / 2


def validation(
    w: torch.Tensor, _decay: torch.Tensor, _batch: object
) -> torch.Tensor:
    return (validation_x @ w - validation_y).square().mean() / 2


def exact(decay: torch.Tensor) -> torch.Tensor:
    """The hypergradient by the closed form of the minimiser."""
    decay = decay.clone().requires_grad_()
    hessian = train_x.mT @ train_x / N + torch.diag(decay.exp())
    w = torch.linalg.solve(hessian, train_x.mT @ train_y / N)
    return torch.autograd.grad(validation(w, decay, None), decay)[0]


start, decay = torch.zeros(D).double(), torch.full((D,), -3.0).double()
solver = bl.BilevelSolver(
    bl.BilevelProblem(ridge, validation),
    bl.optim.SGD(0.3),
    certificate=None,
    on_failure="ignore",
)
METHODS = {
    "Unrolled()": bl.Unrolled(),
    "MLM()": bl.MLM(),
    "Implicit()": bl.Implicit(),
    "MLM(last=10)": bl.MLM(last=10),
    "OneStep()": bl.OneStep(),
}


def measured(method: object, n_steps: int) -> tuple[float, float]:
    """Relative error and median seconds."""
    run = replace(solver, method=method, inner_steps=n_steps)
    seconds = []
    for _ in range(REPEATS):
        began = time.process_time()
        found = run.hypergradient(start, decay).gradient
        seconds.append(time.process_time() - began)
    wanted = exact(decay)
    return float((found - wanted).norm() / wanted.norm()), statistics.median(
        seconds
    )


def main() -> None:
    torch.set_num_threads(1)
    mpl.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "methods", "font.size": 11}
    )
    mpl.rcParams.update({"font.family": "sans-serif", "axes.spines.top": False})
    mpl.rcParams["axes.spines.right"] = False
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    styles = ("-", "--", "-", "-", "-")
    for (name, method), colour, style in zip(
        METHODS.items(), COLOURS, styles, strict=True
    ):
        points = [measured(method, n) for n in STEPS]
        errors, seconds = zip(*points, strict=True)
        print(
            name,
            [f"{e:.1e}" for e in errors],
            [f"{1e3 * s:.0f} ms" for s in seconds],
        )
        shown = {
            "color": colour,
            "linestyle": style,
            "marker": "o",
            "markersize": 4,
            "label": name,
        }
        left.loglog(STEPS, errors, **shown)
        right.loglog([1e3 * s for s in seconds], errors, **shown)
    left.set(xlabel="inner steps", ylabel="relative error of the hypergradient")
    right.set(xlabel="milliseconds")
    for axes in (left, right):
        axes.set_ylim(1e-12, 3)
        axes.grid(color=PALE, linewidth=0.6)
        axes.tick_params(colors=INK, which="both")
        for part in (axes.xaxis.label, axes.yaxis.label):
            part.set_color(INK)
        for spine in axes.spines.values():
            spine.set_color(INK)
    legend = left.legend(
        frameon=False, fontsize=10, labelcolor=INK, loc="lower left"
    )
    legend.set_in_layout(True)
    text = StringIO()
    figure.savefig(
        text,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None},
    )
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    drawn = drawn.replace(PALE, "var(--color-background-border, #ccc)")
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = (
        "\n".join(line.rstrip() for line in drawn.splitlines() if line.strip())
        + "\n"
    )
    Path(__file__).with_suffix(".svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
