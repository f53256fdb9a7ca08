"""Inputs that ended in a crash, or in a message about something else."""

import pickle

import pytest
import torch
from choices import FOLDER
from problems import real
from torch import nn

import bilevel as bl
from bilevel.errors import StructureError, UnsupportedError

HALVE = bl.Map(lambda u, c, t: u * c)


def problem_of(horizon=4):
    return bl.ControlProblem(HALVE, lambda u, c: (u**2).sum(), horizon)


def test_snapshots_on_disk_do_not_lie_on_the_default_device():
    u, c = real(1, 3), real(2, 3)
    expected = bl.adjoint(problem_of(), u, c).gradient
    with torch.device("meta"):
        checkpointing = bl.Checkpointing(storage=bl.OnDisk(FOLDER))
        found = bl.adjoint(problem_of(), u, c, checkpointing=checkpointing).gradient
    assert torch.equal(found, expected)


def test_a_horizon_may_be_an_integer_of_numpy():
    numpy = pytest.importorskip("numpy")
    u, c = real(1, 3), real(2, 3)
    expected = bl.adjoint(problem_of(), u, c).gradient
    assert torch.equal(bl.adjoint(problem_of(numpy.int64(4)), u, c).gradient, expected)


@pytest.mark.parametrize("control", [nn.Linear(2, 2), nn.Linear(2, 2).parameters()], ids=["m", "g"])
def test_a_module_or_its_parameters_as_a_control_are_pointed_to_functional(control):
    with pytest.raises(StructureError, match=r"bilevel.functional"):
        bl.adjoint(problem_of(), real(1, 3), control)


def test_a_compiled_dynamics_that_was_used_can_be_pickled():
    compiled = bl.Compiled(bl.Phases([nn.Linear(2, 2)]))
    compiled._chosen["step"] = lambda u, c, t: u  # what torch.compile makes is no more picklable
    again = pickle.loads(pickle.dumps(compiled))
    assert type(again.dynamics) is bl.Phases
    assert not again._chosen


def test_a_sweep_of_a_control_per_step_may_be_stopped():
    u = real(1, 3)
    control = bl.PerStep([real(t, 3) for t in range(4)])
    whole = bl.adjoint(problem_of(), u, control).gradient
    part = bl.adjoint(problem_of(), u, control, stop=lambda swept: swept.steps.start == 2).gradient
    for t, (found, expected) in enumerate(zip(part.steps, whole.steps, strict=True)):
        assert torch.equal(found, expected if t >= 2 else torch.zeros(3, dtype=u.dtype))


@pytest.mark.parametrize("which", ["observation", "control"])
def test_a_sparse_argument_is_refused_by_name(which):
    given = {"observation": torch.ones(3), "control": torch.ones(3)}
    given[which] = given[which].to_sparse()
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u * c), lambda u, c: u.sum(), 2)
    with pytest.raises(
        UnsupportedError, match=f"{which} must be a dense tensor, got one of layout"
    ):
        bl.adjoint(problem, given["observation"], given["control"])


def test_a_sparse_matrix_in_a_step_is_measured_and_swept():
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    sparse = A.to_sparse()
    u, c = torch.ones(3, 1, dtype=torch.float64), torch.full((3, 1), 0.5, dtype=torch.float64)

    def problem(M):
        return bl.ControlProblem(bl.Map(lambda u, c, t: (M @ u) * c), lambda u, c: (u**2).sum(), 3)

    expected = bl.adjoint(problem(A), u, c).gradient
    for checkpointing in (None, bl.Budget("1 MB"), bl.Budget("40 kB")):
        found = bl.adjoint(problem(sparse), u, c, checkpointing=checkpointing)
        torch.testing.assert_close(found.gradient, expected)


def test_a_sparse_gradient_comes_back_dense():
    words = torch.tensor([0, 2])

    def step(u, table, t):
        return u + torch.nn.functional.embedding(words, table, sparse=True).sum(0)

    problem = bl.ControlProblem(bl.Map(step), lambda u, c: (u**2).sum() / 2, 2)
    table = torch.ones(4, 3, dtype=torch.float64)
    found = bl.adjoint(problem, torch.zeros(3, dtype=torch.float64), table).gradient
    expected = torch.zeros(4, 3, dtype=torch.float64)
    expected[words] = 2 * 4.0  # two steps, u(T) = 4
    torch.testing.assert_close(found, expected)


def test_arguments_on_two_devices_are_refused_with_both():
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u * c), lambda u, c: u.sum(), 2)
    with pytest.raises(StructureError, match="on one device, got tensors on cpu and meta"):
        bl.adjoint(problem, torch.ones(3, 3), torch.ones(3, 3, device="meta"))


STEEP = bl.BilevelSolver(
    bl.BilevelProblem(lambda w, a, _: (w - a).square().sum(), lambda w, a, _: w.square().sum()),
    bl.optim.SGD(0.1),
    inner_steps=3,
    on_failure="ignore",
)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bl.adjoint(problem_of(), torch.ones(2), torch.ones(2)),
        lambda: bl.hvp(problem_of(), torch.ones(2), torch.ones(2), torch.ones(2)),
        lambda: bl.ControlSolver(problem_of()).solve(torch.ones(2), torch.ones(2), steps=2),
        lambda: STEEP.hypergradient(torch.ones(2), torch.ones(2)),
        lambda: STEEP.solve(torch.ones(2), torch.ones(2), steps=2),
    ],
    ids=["adjoint", "hvp", "control solve", "hypergradient", "bilevel solve"],
)
def test_inference_mode_is_named(call):
    with torch.inference_mode(), pytest.raises(UnsupportedError, match="inference_mode"):
        call()


@pytest.fixture(scope="module")
def compiled():
    return torch.compile(lambda w, a, _: (w - a).square().sum(), backend="aot_eager")


@pytest.mark.xdist_group("compiled")  # once
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of dynamo, while it traces
@pytest.mark.parametrize("method", [bl.MLM(), bl.Unrolled(), bl.Implicit(), bl.OneStep()], ids=repr)
def test_a_compiled_inner_objective_has_no_second_derivative(method, compiled):
    problem = bl.BilevelProblem(compiled, lambda w, a, _: w.square().sum())
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.1), 3, method, certificate=None)
    with pytest.raises(UnsupportedError, match="second derivative of a function"):
        solver.hypergradient(torch.ones(2), torch.ones(2))


MADE = {
    "adjoint": lambda x: bl.adjoint(problem_of(), x, x).gradient,
    "hvp": lambda x: bl.hvp(problem_of(), x, x, x).product,
    "total_cost": lambda x: bl.total_cost(problem_of(), x, x),
    "control solve": lambda x: (
        bl.ControlSolver(problem_of(), lambda p: torch.optim.SGD(p, 0.01))
        .solve(x, x, steps=2)
        .control
    ),
    "hypergradient": lambda x: STEEP.hypergradient(x, 2 * x).gradient,
    "bilevel hvp": lambda x: STEEP.hvp(x, x, x).product,
    "implicit": lambda x: bl.implicit(lambda a: a**0.5, lambda w, a: w**2 - a)(x),
    "adapt": lambda x: bl.adapt(bl.optim.SGD(0.1), x, lambda w: (w**2).sum(), 2),
}


@pytest.mark.parametrize("name", MADE)
def test_tensors_made_in_inference_mode_are_taken_outside(name):
    with torch.inference_mode():
        made = torch.ones(2)
    torch.testing.assert_close(MADE[name](made), MADE[name](torch.ones(2)))


EMPTY_METHODS = [bl.MLM(), bl.Unrolled(), bl.Implicit(), bl.Penalty(), bl.OneStep()]


@pytest.mark.parametrize("method", EMPTY_METHODS, ids=repr)
def test_a_problem_without_a_single_number_has_an_empty_hypergradient(method):
    problem = bl.BilevelProblem(
        lambda w, a, b: ((w - a) ** 2).sum(), lambda w, a, b: ((w - 1) ** 2).sum()
    )
    nothing = torch.zeros(0)
    found = bl.BilevelSolver(problem, bl.optim.SGD(0.1), 5, method).hypergradient(nothing, nothing)
    assert found.gradient.shape == (0,)
    assert found.value == 0
