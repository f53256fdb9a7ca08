"""Derivatives of implicit functions of any order and nesting, against closed forms."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import cplx, real, square
from torch import Tensor, nn

import bilevel as bl
from bilevel.autodiff import recording

F64 = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


@dataclass(frozen=True, eq=False)
class Case:
    """An equation with a solver that leaves no graph, and the solution as a torch function.

    Attributes:
        solve: of the control.
        exact: differentiable by reverse mode; where there is no closed form, Newton steps from the
            solution, each of which makes two more orders of derivatives exact.
        settings: the equation.
        at: a real vector.
    """

    name: str
    solve: Callable[[Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]
    settings: dict[str, Any]
    at: Tensor

    def __repr__(self) -> str:
        return self.name

    @property
    def function(self):
        return bl.implicit(self.solve, **self.settings)


def by_numpy(exact):
    """A solver that torch cannot see into."""
    return lambda a: torch.from_numpy(exact(a).numpy().copy())


X, Y = real(1, 11, 4), real(2, 11)


def ridge() -> Case:
    def exact(a):
        return torch.linalg.inv(X.T @ X / 11 + torch.diag(a.exp())) @ (X.T @ Y / 11)

    def residual(w, a):
        return X.T @ (X @ w - Y) / 11 + a.exp() * w

    return Case("ridge", by_numpy(exact), exact, {"residual": residual}, 0.3 * real(3, 4))


def logistic() -> Case:
    labels = (Y > 0).double()

    def loss(w, a):
        fit = nn.functional.softplus(X @ w).sum() - labels @ (X @ w)
        return fit / 11 + (a.exp() * w**2).sum() / 2

    def newton(w, a):
        p = torch.sigmoid(X @ w)
        hessian = X.T @ ((p * (1 - p))[:, None] * X) / 11 + torch.diag(a.exp())
        return w - torch.linalg.inv(hessian) @ (X.T @ (p - labels) / 11 + a.exp() * w)

    def solve(a):
        w = torch.zeros(4, dtype=F64)
        for _ in range(12):
            w = newton(w, a)
        return w

    def exact(a):
        w = solve(a.detach() if not torch._C._are_functorch_transforms_active() else a)
        return newton(newton(newton(w, a), a), a)

    return Case("logistic", solve, exact, {"objective": loss}, 0.3 * real(4, 4) - 1)


def fixed_point() -> Case:
    """A complex one that is real-linear: w = A w + B conj(w) + e^{i a}."""
    A, B = 0.2 * cplx(5, 4, 4), 0.2 * cplx(6, 4, 4)
    eye = torch.eye(4, dtype=F64)
    M = torch.cat(
        [
            torch.cat([eye - (A + B).real, (A - B).imag], 1),
            torch.cat([-(A + B).imag, eye - (A - B).real], 1),
        ]
    )
    inverse = torch.linalg.inv(M)

    def exact(a):
        both = inverse @ torch.cat([a.cos(), a.sin()])
        return torch.complex(both[:4], both[4:])

    def residual(w, a):
        return w - A @ w - B @ w.conj() - torch.complex(a.cos(), a.sin())

    return Case("complex fixed point", by_numpy(exact), exact, {"residual": residual}, real(7, 4))


def zero_dimensional() -> Case:
    return Case(
        "0-d",
        lambda a: a.sum().exp() ** 0.5,
        lambda a: a.sum().exp() ** 0.5,
        {"residual": lambda w, a: w**2 - a.sum().exp()},
        0.3 * real(8, 4),
    )


CASES = [ridge(), logistic(), fixed_point(), zero_dimensional()]
every_case = pytest.mark.parametrize("case", CASES, ids=repr)


def loss_of(function):
    """A real scalar that is curved in the solution."""
    return lambda a: square(function(a)) + square(function(a) ** 2 + 1) / 3


# What torch.func has, built of reverse mode alone: forward mode over `torch.linalg` is not to be
# trusted in nestings, and vmap is what is tested.
def _jvp(function, at, along):
    return function(at[0]), torch.func.jacrev(function)(at[0]) @ along[0]


REFERENCE = SimpleNamespace(
    grad=torch.func.grad,
    jacrev=torch.func.jacrev,
    jacfwd=torch.func.jacrev,
    hessian=lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    vmap=lambda f: lambda xs: torch.stack([f(x) for x in xs]),
    jvp=_jvp,
)
MANY, ALONG = 0.2 * real(9, 3, 4), real(10, 4)
NESTINGS = {
    "grad": lambda T, f, a: T.grad(loss_of(f))(a),
    "jacrev": lambda T, f, a: T.jacrev(lambda x: parts(f(x)))(a),
    "jacfwd": lambda T, f, a: T.jacfwd(lambda x: parts(f(x)))(a),
    "hessian": lambda T, f, a: T.hessian(loss_of(f))(a),
    "jacrev of jacfwd": lambda T, f, a: T.jacrev(T.jacfwd(lambda x: parts(f(x))))(a),
    "jacfwd of jacfwd": lambda T, f, a: T.jacfwd(T.jacfwd(lambda x: parts(f(x))))(a),
    "vmap": lambda T, f, a: T.vmap(lambda x: parts(f(x)))(a + MANY),
    "vmap of grad": lambda T, f, a: T.vmap(T.grad(loss_of(f)))(a + MANY),
    "grad of vmap": lambda T, f, a: T.grad(lambda xs: T.vmap(loss_of(f))(xs).square().sum())(
        a + MANY
    ),
    "vmap of hessian": lambda T, f, a: T.vmap(T.hessian(loss_of(f)))(a + MANY),
    "vmap of vmap of grad": lambda T, f, a: T.vmap(T.vmap(T.grad(loss_of(f))))(
        a + torch.stack([MANY, 2 * MANY])
    ),
    "jvp of grad": lambda T, f, a: T.jvp(T.grad(loss_of(f)), (a,), (ALONG,))[1],
    "third derivative": lambda T, f, a: T.jacfwd(T.hessian(loss_of(f)))(a),
}


def parts(w):
    return torch.view_as_real(w).flatten() if w.is_complex() else w.reshape(-1)


@every_case
@pytest.mark.parametrize("nesting", NESTINGS)
def test_every_transform_gives_the_closed_form(case, nesting):
    measure = NESTINGS[nesting]
    found = measure(torch.func, case.function, case.at)
    torch.testing.assert_close(found, measure(REFERENCE, case.exact, case.at), **TIGHT)


@every_case
def test_backward_differentiates_three_times(case):
    def thrice(function):
        a = case.at.clone().requires_grad_()
        found = [loss_of(function)(a)]
        for _ in range(3):
            slope = torch.autograd.grad(found[-1], a, create_graph=True)[0]
            found.append((slope * ALONG).sum())
        found[-1].backward()
        return *found, a.grad

    for one, other in zip(thrice(case.function), thrice(case.exact), strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), **TIGHT)


@pytest.mark.parametrize("linear", [bl.linear.CG(1e-13), bl.linear.GMRES(rtol=1e-13), None])
def test_any_linear_solver_of_a_symmetric_system(linear):
    case = ridge()
    found = torch.func.hessian(loss_of(bl.implicit(case.solve, **case.settings, linear=linear)))
    torch.testing.assert_close(found(case.at), REFERENCE.hessian(loss_of(case.exact))(case.at))


def test_large_systems_are_solved_without_a_matrix():
    # n = 300: beyond what is formed; symmetric by CG, a rotation by GMRES.
    d = 1 + real(1, 300).square()
    turn = torch.diag(d) + torch.triu(real(2, 300, 300), 1) / 40

    for M in (torch.diag(d), turn):
        f = bl.implicit(lambda a, M=M: torch.linalg.solve(M, a), lambda w, a, M=M: M @ w - a)
        gradient = torch.func.grad(lambda a, f=f: (f(a) ** 2).sum())(real(3, 300))
        exact = 2 * torch.linalg.solve(M.T, torch.linalg.solve(M, real(3, 300)))
        torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-9)


def test_trees_with_integers_none_and_settings_by_name():
    def solve(p, *, power=1, skip=None):
        w = (p["a"] * p["n"]).sqrt() ** power
        return {"w": w, "pair": (3, torch.tensor([1, 2])), "x": None}

    def residual(s, p, *, power=1, skip=None):
        return {"w": s["w"] ** (2 / power) - p["a"] * p["n"], "pair": (None, None), "x": None}

    f = bl.implicit(solve, residual)
    a = torch.tensor([2.0, 3.0], dtype=F64, requires_grad=True)
    given = {"a": a, "n": torch.tensor(4), "none": None, "flag": 7}
    solution = f(given, power=2, skip=None)
    assert (solution["pair"][0], solution["x"]) == (3, None)
    assert solution["pair"][1].tolist() == [1, 2]
    solution["w"].square().sum().backward()
    torch.testing.assert_close(a.grad, 32 * a.detach())


def test_several_arguments_and_complex_ones():
    b, c = cplx(1, 3).requires_grad_(), (2 + real(2, 3)).requires_grad_()
    f = bl.implicit(lambda b, c, n: b * c**n, lambda w, b, c, n: w - b * c**n)
    assert torch.autograd.gradcheck(lambda b, c: f(b, c, 2), (b, c), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda b, c: f(b, c, 2), (b, c), check_fwd_over_rev=True)


def test_what_only_the_solver_reads_has_derivative_zero():
    f = bl.implicit(lambda a, guess: a**0.5 + 0 * guess, lambda w, a, guess: w**2 - a)
    found = torch.func.grad(f, argnums=(0, 1))(torch.tensor(4.0), torch.tensor(1.0))
    assert found == (torch.tensor(0.25), torch.tensor(0.0))


def test_as_a_decorator_with_aux():
    @bl.implicit(residual=lambda w, a: w**2 - a, has_aux=True)
    def root(a):
        """The square root."""
        return a**0.5, {"steps": 3, "sum": a.sum()}

    assert root.__name__ == "root"
    a = torch.tensor([4.0, 9.0], requires_grad=True)
    w, aux = root(a)
    assert (aux["steps"], aux["sum"].requires_grad) == (3, False)
    w.sum().backward()
    torch.testing.assert_close(a.grad, 0.5 / a.detach() ** 0.5)
    each = torch.vmap(lambda x: root(x)[1]["sum"])(torch.ones(5, 2))
    assert each.tolist() == [2.0] * 5


def test_a_vectorized_solver_is_called_once():
    calls = []

    def solve(a, b):
        calls.append(tuple(a.shape))
        return a.sqrt() * b

    f = bl.implicit(solve, lambda w, a, b: w**2 - a * b**2, vectorized=True)
    a, b = 1 + real(1, 3, 2).square(), 1 + real(2, 4, 2).square()
    nested = torch.vmap(torch.vmap(f, in_dims=(0, None)), in_dims=(None, 0))
    torch.testing.assert_close(nested(a, b), a.sqrt() * b[:, None])
    assert calls == [(12, 2)]


class Columns(bl.linear.LinearSolver):
    """Conjugate gradients that note how many columns they are given."""

    def __init__(self):
        self.seen = []

    def solve(self, operator, rhs, start=None):
        self.seen.append(operator.columns)
        return bl.linear.Dense().solve(operator, rhs, start)


@pytest.mark.parametrize("looks", [False, True], ids=["plain", "looks at values"])
@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap"])
def test_members_of_a_vmap_are_one_linear_system_of_columns(order, looks):
    linear = Columns()

    def residual(w, a):
        if looks and float(a.detach().sum()) > 1e9:  # vmap refuses: member by member
            return w
        return w**3 - a

    f = bl.implicit(lambda a: a ** (1 / 3), residual, linear=linear)
    a = 1 + real(1, 5, 2).square()

    def loss(x):
        return f(x).square().sum()

    if order == "vmap of grad":
        found = torch.vmap(torch.func.grad(loss))(a)
    else:
        found = torch.func.grad(lambda xs: torch.vmap(loss)(xs).sum())(a)
    torch.testing.assert_close(found, 2 / 3 * a ** (-1 / 3))
    assert linear.seen == [5]


class Cube(torch.autograd.Function):
    """An operation as they used to be written, which torch.func refuses."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, v):
        return 3 * ctx.saved_tensors[0] ** 2 * v


def test_a_residual_that_torch_func_cannot_enter():
    f = bl.implicit(lambda a: a ** (1 / 3), lambda w, a: Cube.apply(w) - a)
    a = torch.tensor(8.0, dtype=F64)
    assert torch.func.grad(f)(a).item() == pytest.approx(1 / 12, rel=1e-12)
    assert torch.func.hessian(f)(a).item() == pytest.approx(-1 / 144, rel=1e-12)


def test_implicit_functions_nest():
    root = bl.implicit(lambda a: a.sqrt(), lambda w, a: w**2 - a)
    fourth = bl.implicit(lambda a: a**0.25, lambda w, a: root(w) ** 4 - root(a))
    nearest = bl.implicit(lambda a: a**0.25, objective=lambda w, a: (w - fourth(a)).square().sum())
    a = torch.tensor([2.0, 5.0], dtype=F64)
    for f in (fourth, nearest):
        hessian = torch.func.hessian(lambda x, f=f: f(x).sum())(a)
        torch.testing.assert_close(hessian, torch.diag(-3 / 16 * a**-1.75), **TIGHT)
        b = a.clone().requires_grad_()
        f(b).sum().backward()
        torch.testing.assert_close(b.grad, a**-0.75 / 4, **TIGHT)


def test_a_residual_with_a_rollout_in_it():
    halve = bl.Map(lambda state, control, t: state * control)
    f = bl.implicit(lambda c: 1 / c**3, lambda w, c: bl.rollout(halve, w, c, 3) - 1)
    c = torch.tensor(0.8, dtype=F64)
    assert torch.func.grad(f)(c).item() == pytest.approx(-3 / 0.8**4, rel=1e-12)
    twice = torch.func.grad(torch.func.grad(f))(c)  # hessian() asks a rollout for a third one
    assert twice.item() == pytest.approx(12 / 0.8**5, rel=1e-12)


def test_forward_duals_of_torch_itself():
    import torch.autograd.forward_ad as forward

    f = bl.implicit(lambda a: a.sqrt(), lambda w, a: w**2 - a)
    with forward.dual_level():
        found = f(forward.make_dual(torch.tensor(4.0), torch.tensor(1.0)))
        assert forward.unpack_dual(found).tangent.item() == 0.25


def test_the_solver_may_differentiate_by_itself_and_the_solution_be_written_to():
    def solve(a):
        w = torch.ones_like(a, requires_grad=True)
        descent = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

        def closure():
            descent.zero_grad()
            value = (w**4 / 4 - a * w).sum()
            value.backward()
            return value

        descent.step(closure)
        return w

    f = bl.implicit(solve, objective=lambda w, a: (w**4 / 4 - a * w).sum())
    a = torch.tensor([2.0, 5.0], dtype=F64, requires_grad=True)
    w = f(a)
    w.mul_(3)
    w.sum().backward()
    torch.testing.assert_close(a.grad, a.detach() ** (-2 / 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_dtypes(dtype):
    f = bl.implicit(lambda a: a.sqrt(), lambda w, a: w**2 - a)
    found = torch.func.grad(lambda a: f(a).sum())(torch.tensor([4.0, 9.0], dtype=dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), torch.tensor([1 / 4, 1 / 6]), rtol=1e-2, atol=0)


def test_without_grad_in_inference_and_of_nothing():
    f = bl.implicit(lambda a: a.sqrt(), lambda w, a: w**2 - a)
    with torch.inference_mode():
        assert f(torch.tensor(4.0)).item() == 2
    with torch.no_grad():
        assert not f(torch.tensor(4.0, requires_grad=True)).requires_grad
    empty = torch.zeros(0, requires_grad=True)
    f(empty).sum().backward()
    assert empty.grad.shape == (0,)


def test_inside_an_inner_objective_it_counts_as_any_operation():
    # f = (w - root(a))^2 / 2 and F = w^2 / 2: the value is a / 2, and three levels are right.
    root = bl.implicit(lambda a: a.sqrt(), lambda v, a: v**2 - a)
    problem = bl.BilevelProblem(
        lambda w, a, batch: (root(w**2 + 1) ** 2 - 1 - 2 * w * root(a) + a) / 2,
        lambda w, a, batch: w**2 / 2,
    )
    a, start = torch.tensor(3.0, dtype=F64), torch.tensor(1.0, dtype=F64)
    for method in (bl.Implicit(), bl.MLM(), bl.Unrolled()):
        solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 60, method)
        found = solver.hypergradient(start, a)
        assert found.gradient.item() == pytest.approx(0.5, rel=1e-10)
        assert found.certificate.trustworthy


def test_it_may_be_called_where_graphs_are_recorded():
    root = bl.implicit(lambda a: a.sqrt(), lambda v, a: v**2 - a)
    with recording():
        a = torch.tensor(4.0, requires_grad=True)
        assert torch.autograd.grad(root(a), a)[0].item() == 0.25


@pytest.mark.filterwarnings("ignore::UserWarning")  # of dynamo, while it traces
@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="dynamo of 2.6 raises a KeyError")
def test_a_compiled_function_may_hold_one():
    double = bl.implicit(lambda a: 2 * a, lambda w, a: w - 2 * a)
    a = torch.tensor([1.0, 2.0], requires_grad=True)
    found = torch.compile(lambda a: double(a) ** 2, backend="eager")(a)
    torch.testing.assert_close(found, torch.tensor([4.0, 16.0]))
    (slope,) = torch.autograd.grad(found.sum(), a)
    torch.testing.assert_close(slope, torch.tensor([8.0, 16.0]))
