"""A solution found by SciPy as a differentiable function: ours, jaxopt and TorchOpt on one problem.

Run with `python -m benchmarks.solutions` in an environment that has them. Logistic regression with
a decay for each of 64 weights, 200 samples, float64; L-BFGS of SciPy to a gradient of 1e-10, the
same call for all three; the gradient of a validation loss in the log-decays, its Hessian, and the
gradients of 8 controls under vmap. Errors are against Newton's method and the closed form of the
implicit function theorem. Processor time, one thread, medians of runs in turn; lines are those of
each maker.
"""

import argparse
import inspect
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import scipy.optimize
import torch
from scipy.special import expit

import bilevel as bl
from benchmarks.measure import machine, paired_times

Array = np.ndarray
N, D, MEMBERS = 200, 64, 8
generator = np.random.default_rng(0)
X, V = generator.standard_normal((N, D)), generator.standard_normal((N, D))
TRUTH = generator.standard_normal(D) / 4
Y, Z = ((a @ TRUTH + generator.standard_normal(N) > 0).astype(float) for a in (X, V))
CONTROL = 0.3 * generator.standard_normal(D) - 3
CONTROLS = CONTROL + 0.1 * generator.standard_normal((MEMBERS, D))


def scipy_solution(control: Array) -> Array:
    """The minimiser, found outside of every library."""
    decay = np.exp(control)

    def value_and_slope(w: Array) -> tuple[float, Array]:
        z = X @ w
        value = np.mean(np.logaddexp(0, z) - Y * z) + decay @ w**2 / 2
        return value, X.T @ (expit(z) - Y) / N + decay * w

    options = {"gtol": 1e-10, "ftol": 0, "maxiter": 1000}
    found = scipy.optimize.minimize(
        value_and_slope, np.zeros(D), jac=True, method="L-BFGS-B", options=options
    )
    return found.x


def exact(control: Array) -> Array:
    """The gradient at the minimiser that Newton's method finds from there."""
    w, decay = scipy_solution(control), np.exp(control)
    for _ in range(5):
        p = expit(X @ w)
        hessian = X.T @ ((p * (1 - p))[:, None] * X) / N + np.diag(decay)
        w = w - np.linalg.solve(hessian, X.T @ (p - Y) / N + decay * w)
    q = np.linalg.solve(hessian, V.T @ (expit(V @ w) - Z) / N)
    return -q * decay * w


Asked = dict[str, Callable[[], Any]]


def ours() -> Asked:
    x, y, v, z = map(torch.from_numpy, (X, Y, V, Z))
    loss = torch.nn.functional.binary_cross_entropy_with_logits

    def objective(w: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return loss(x @ w, y) + (a.exp() * w**2).sum() / 2

    def solve(a: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(scipy_solution(a.numpy()))

    fitted = bl.implicit(solve, objective=objective)
    gradient = torch.func.grad(lambda a: loss(v @ fitted(a), z))
    return {
        "gradient": lambda: gradient(torch.from_numpy(CONTROL)).numpy(),
        "vmap": lambda: torch.func.vmap(gradient)(torch.from_numpy(CONTROLS)).numpy(),
        "hessian": lambda: torch.func.jacrev(gradient)(torch.from_numpy(CONTROL)).numpy(),
    }


def torchopt() -> Asked:
    import torchopt

    x, y, v, z = map(torch.from_numpy, (X, Y, V, Z))
    loss = torch.nn.functional.binary_cross_entropy_with_logits

    def objective(w: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return loss(x @ w, y) + (a.exp() * w**2).sum() / 2

    cg = torchopt.linear_solve.solve_normal_cg(rtol=1e-10, atol=0.0, maxiter=1000)

    @torchopt.diff.implicit.custom_root(torch.func.grad(objective), argnums=1, solve=cg)
    def fitted(w: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(scipy_solution(a.detach().numpy())).requires_grad_()

    def gradient() -> Array:
        a = torch.from_numpy(CONTROL).requires_grad_()
        return torch.autograd.grad(loss(v @ fitted(torch.zeros(D).double(), a), z), a)[0].numpy()

    def validation(a: torch.Tensor) -> torch.Tensor:
        return loss(v @ fitted(torch.zeros(D).double(), a), z)

    controls = torch.from_numpy(CONTROLS)
    return {
        "gradient": gradient,
        "vmap": lambda: torch.func.vmap(torch.func.grad(validation))(controls).numpy(),
        "hessian": lambda: torch.autograd.functional.hessian(
            validation, torch.from_numpy(CONTROL)
        ).numpy(),
    }


def jaxopt() -> Asked:
    import jax
    import jaxopt

    jax.config.update("jax_enable_x64", val=True)
    jnp = jax.numpy

    def loss(scores: Any, labels: Any) -> Any:
        return jnp.mean(jnp.logaddexp(0, scores) - labels * scores)

    def objective(w: Any, a: Any) -> Any:
        return loss(X @ w, Y) + jnp.sum(jnp.exp(a) * w**2) / 2

    def cg(matvec: Any, b: Any) -> Any:
        return jaxopt.linear_solve.solve_cg(matvec, b, tol=1e-12, maxiter=1000)

    @jaxopt.implicit_diff.custom_root(jax.grad(objective), solve=cg)
    def fitted(_w: Any, a: Any) -> Any:
        shape = jax.ShapeDtypeStruct((D,), a.dtype)
        return jax.pure_callback(scipy_solution, shape, a, vmap_method="sequential")

    gradient = jax.jit(jax.grad(lambda a: loss(V @ fitted(None, a), Z)))
    second = jax.jit(jax.jacrev(gradient))
    batch = jax.jit(jax.vmap(gradient))
    return {
        "gradient": lambda: np.asarray(gradient(CONTROL)),
        "vmap": lambda: np.asarray(batch(CONTROLS)),
        "hessian": lambda: np.asarray(second(CONTROL)),
    }


def lines(maker: Callable[[], Asked]) -> int:
    """Of code, without blank ones and comments."""
    source = inspect.getsource(maker).splitlines()
    return sum(bool(x.strip()) and not x.strip().startswith("#") for x in source)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(machine())
    names = {"torchopt": torchopt, "jaxopt": jaxopt}
    makers = {"bilevel": ours, **{n: make for n, make in names.items() if find_spec(n)}}
    asked = {name: make() for name, make in makers.items()}
    h = 1e-5
    truth = {
        "gradient": exact(CONTROL),
        "vmap": np.stack([exact(c) for c in CONTROLS]),
        "hessian": np.stack(
            [(exact(CONTROL + h * e) - exact(CONTROL - h * e)) / (2 * h) for e in np.eye(D)]
        ),
    }
    for what, right in truth.items():
        runs: dict[str, Callable[[], Any]] = {}
        for name, run in ((n, questions[what]) for n, questions in asked.items()):
            try:
                error = np.linalg.norm(run() - right) / np.linalg.norm(right)
            except Exception as reason:
                text = str(reason).splitlines()[0][:90]
                print(f"{what:9} {name:8} {type(reason).__name__}: {text}")
                continue
            print(f"{what:9} {name:8} relative error {error:.1e}, {lines(makers[name])} lines")
            runs[name] = run
        timed = paired_times([*runs.values()], given.repeats, clock=time.process_time)
        print(
            "    "
            + ", ".join(f"{n} {1e3 * t.median:.1f} ms" for n, t in zip(runs, timed, strict=True))
        )
    begun = time.process_time()
    for _ in range(5):
        scipy_solution(CONTROL)
    print(f"    SciPy alone: {200 * (time.process_time() - begun):.1f} ms a solution")


if __name__ == "__main__":
    main()
