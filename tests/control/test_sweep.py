"""What the sweeps keep, evaluate and refuse, and what they leave as it was."""

import pytest
import torch
from choices import CHECKPOINTINGS, PATHS
from problems import Custom, case_named, real, square
from reference import assert_same, autograd, fresh, plain_cost, plain_gradients
from steps import Graphs, Noise
from torch import nn

import bilevel as bl
from bilevel import tree
from bilevel.errors import ArgumentError, LostGradientError, StructureError

every_checkpointing = pytest.mark.parametrize("checkpointing", CHECKPOINTINGS, ids=repr)
every_path = pytest.mark.parametrize("checkpointing", PATHS, ids=repr)
STATES, GRAPHS = CHECKPOINTINGS[:2]
C, U = 0.5 * real(1, 3), real(2, 3)


def problem_of(step, horizon=4, running=None, terminal=None, **functions):
    return bl.ControlProblem(
        Custom(step, **functions), terminal or (lambda u, c: (u**2).sum()), horizon, running
    )


def tanh(u, c, t):
    return torch.tanh(c * u + t)


def graph_sizes(checkpointing, horizon, running=None):
    """Tensors held by graphs whenever a step begins, and after the sweep."""
    graphs, seen = Graphs(), []

    def step(u, c, t):
        seen.append(len(graphs.live))
        return torch.tanh(c * u + t)

    with graphs.hooks:
        bl.adjoint(problem_of(step, horizon, running), U, C, checkpointing=checkpointing)
    return seen, len(graphs.live)


@pytest.mark.parametrize("running", [None, lambda u, c, t: (u**2 * c).sum()])
def test_one_step_has_a_graph_at_a_time_when_states_are_kept(running):
    seen, after = graph_sizes(STATES, 6, running)
    own = seen[-1]  # of the running cost of the step that begins
    assert seen == [0] * 5 + [own] * 8  # two of them compare gradients, the first time
    assert (own > 0) == (running is not None)
    assert after == 0


def test_every_step_keeps_its_graph_when_graphs_are_kept():
    seen, after = graph_sizes(GRAPHS, 6)
    per_step = seen[1]
    assert per_step > 0
    assert seen == [t * per_step for t in range(6)]
    assert after == 0


@pytest.mark.parametrize("horizon", [0, 1, 2, 5])
def test_states_kept_evaluate_every_step_but_the_last_twice(horizon):
    calls = []

    def step(u, c, t):
        calls.append(t)
        return tanh(u, c, t)

    problem = problem_of(step, horizon, terminal=lambda u, c: (u * c).sum())
    bl.adjoint(problem, U, C)  # the first of all compares the gradients of two evaluations
    calls.clear()
    found = bl.adjoint(problem, U, C)
    assert found.forward_steps == len(calls) == max(2 * horizon - 1, 0)
    assert calls == [*range(1, horizon + 1), *range(horizon - 1, 0, -1)]


@pytest.mark.parametrize("horizon", [0, 1, 2, 5])
def test_graphs_kept_evaluate_every_step_once(horizon):
    calls = []

    def step(u, c, t):
        calls.append(t)
        return tanh(u, c, t)

    problem = problem_of(step, horizon, terminal=lambda u, c: (u * c).sum())
    found = bl.adjoint(problem, U, C, checkpointing=GRAPHS)
    assert found.forward_steps == horizon
    assert calls == [*range(1, horizon + 1)]


def test_the_default_checkpointing_keeps_states():
    assert bl.adjoint(problem_of(tanh), U, C).forward_steps == 7


# --- Writes in place


def test_a_step_that_writes_to_its_state_is_refused():
    def step(u, c, t):
        u.add_(0.0)
        return u * c

    with pytest.raises(ArgumentError, match="step 1 writes to its state in place"):
        bl.adjoint(problem_of(step), U.clone(), C)


@every_path
def test_a_step_that_writes_to_an_integer_of_its_state_is_refused(checkpointing):
    def step(u, c, t):
        u["n"].add_(0)
        return {**u, "x": torch.tanh(u["x"] * c)}

    problem = problem_of(step, terminal=lambda u, c: u["x"].sum())
    with pytest.raises(ArgumentError, match="step 1 writes to its state in place"):
        bl.adjoint(problem, {"x": U, "n": torch.tensor(1)}, C, checkpointing=checkpointing)


@every_path
def test_a_step_that_puts_another_tensor_into_its_state_is_refused(checkpointing):
    def step(u, c, t):
        u["x"] = torch.tanh(u["x"] * c)
        return {"x": u["x"] * c}

    problem = problem_of(step, terminal=lambda u, c: u["x"].sum())
    with pytest.raises(ArgumentError, match="step 1 writes to its state in place"):
        bl.adjoint(problem, {"x": U}, C, checkpointing=checkpointing)


@every_path
def test_a_step_that_puts_another_tensor_into_its_control_is_refused(checkpointing):
    def step(u, c, t):
        c["x"] = c["x"] * 2
        return torch.tanh(u * c["x"])

    with pytest.raises(ArgumentError, match="writes to its control in place"):
        bl.adjoint(problem_of(step), U, {"x": C}, checkpointing=checkpointing)


def test_a_step_that_writes_to_its_control_is_refused():
    control = C.clone()

    def step(u, c, t):
        return u * c.mul_(0.5)

    with pytest.raises(ArgumentError, match="writes to its control in place"):
        bl.adjoint(problem_of(step), U, control)
    assert torch.equal(control, C)


def test_an_init_that_writes_to_the_observation_is_refused():
    problem = problem_of(tanh, g0=lambda f, c: f.mul_(1.0) * c)
    with pytest.raises(ArgumentError, match="writes to its observation or its control"):
        bl.adjoint(problem, U.clone(), C)


def test_a_taped_step_that_writes_to_its_state_is_refused():
    with pytest.raises(ArgumentError, match="in place"):
        bl.adjoint(problem_of(lambda u, c, t: u.add_(c)), U.clone(), C, checkpointing=GRAPHS)


# --- Structures


CHANGES = {
    "shape": (
        lambda u, c, t: {"x": u["x"][:-1]},
        r"u\(1\)\['x'\] must be float64\[3\].*float64\[2\]",
    ),
    "dtype": (lambda u, c, t: {"x": u["x"].float()}, r"u\(1\)\['x'\] must be float64.*got float32"),
    "name": (lambda u, c, t: {"y": u["x"]}, r"u\(1\) must be PyTreeSpec.*'x'.*got.*'y'"),
    "kind": (lambda u, c, t: {"x": 3}, r"u\(1\)\['x'\] must be float64\[3\] on cpu, got int"),
    "complex": (lambda u, c, t: {"x": u["x"] + 1j}, r"u\(1\)\['x'\] must be float64.*complex128"),
}


@every_path
@pytest.mark.parametrize("change", CHANGES)
def test_a_step_that_changes_the_state_is_refused_with_the_name_of_the_leaf(change, checkpointing):
    step, message = CHANGES[change]
    problem = problem_of(step, terminal=lambda u, c: (c**2).sum())
    with pytest.raises(StructureError, match="step 1 must return a state.*" + message):
        bl.adjoint(problem, {"x": U}, C, checkpointing=checkpointing)


@every_path
@pytest.mark.parametrize("which", ["terminal", "running"])
@pytest.mark.parametrize(
    ("value", "came"),
    [
        (lambda u, c: u * c, r"float64\[3\] on cpu"),
        (lambda u, c: (u * c).sum() * 1j, r"complex128\[\] on cpu"),
        (lambda u, c: 1.0, "float"),
        (lambda u, c: torch.tensor(1), r"int64\[\] on cpu"),
    ],
)
def test_a_cost_that_is_no_real_scalar_is_refused_by_name(which, value, came, checkpointing):
    costs = {which: value if which == "terminal" else lambda u, c, t: value(u, c)}
    with pytest.raises(
        StructureError,
        match=f"the {which} cost( at t = \\d)? must return a real scalar tensor.*got {came}",
    ):
        bl.adjoint(problem_of(tanh, **costs), U, C, checkpointing=checkpointing)


@every_path
@pytest.mark.parametrize(
    ("observation", "control", "message"),
    [
        (1.0, C, "observation must be a tensor.*got float"),
        (U, {"rate": 0.5}, r"control\['rate'\] must be a tensor.*got float"),
        (U, bl.PerStep([C] * 3), "control.steps must have one entry per step, 4 .* got 3"),
        (U, bl.PerStep([C, C, C, [0.5]]), r"control.steps\[3\]\[0\] must be a tensor"),
        (U, bl.PerStep([C] * 4, initial="a"), "control.initial must be a tensor.*got str"),
    ],
)
def test_arguments_that_are_not_tensors_or_do_not_fit_are_refused_by_name(
    observation, control, message, checkpointing
):
    with pytest.raises(StructureError, match=message):
        bl.adjoint(problem_of(tanh), observation, control, checkpointing=checkpointing)


@every_path
def test_an_initial_state_that_is_no_tensor_is_refused(checkpointing):
    problem = problem_of(tanh, g0=lambda f, c: {"x": 1.0})
    with pytest.raises(StructureError, match=r"u\(0\)\['x'\] must be a tensor"):
        bl.adjoint(problem, U, C, checkpointing=checkpointing)


# --- Lost gradients


HIDDEN = real(3, 3).requires_grad_()


def hidden_at(t):
    return lambda u, c, s: u * c + (HIDDEN if s == t else 0.0)


@every_path
@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("step 1 of the dynamics", problem_of(hidden_at(1))),
        ("step 4 of the dynamics", problem_of(hidden_at(4))),
        ("step 1 of the dynamics", problem_of(hidden_at(1), horizon=1)),
        ("step 1 of the dynamics", problem_of(lambda u, c, t: c * (2 * HIDDEN).exp())),
        (r"dynamics.init", problem_of(tanh, g0=lambda f, c: f * HIDDEN)),
        (r"dynamics.init", problem_of(tanh, g0=lambda f, c: HIDDEN)),
        ("the terminal cost", problem_of(tanh, terminal=lambda u, c: (u * HIDDEN).sum())),
        ("the terminal cost", problem_of(tanh, terminal=lambda u, c: HIDDEN.sum())),
        ("the running cost", problem_of(tanh, running=lambda u, c, t: (u * HIDDEN).sum())),
        ("the running cost", problem_of(tanh, running=lambda u, c, t: HIDDEN.sum())),
    ],
)
def test_a_hidden_tensor_that_requires_grad_is_refused(source, problem, checkpointing):
    message = source + r" uses a tensor of shape \(3,\) that requires grad"
    with pytest.raises(LostGradientError, match=message):
        bl.adjoint(problem, U, C, checkpointing=checkpointing)
    with torch.no_grad(), pytest.raises(LostGradientError, match=message):
        bl.adjoint(problem, U, C, checkpointing=checkpointing)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("step 4", problem_of(hidden_at(4))),
        ("step 2", problem_of(hidden_at(2))),
        ("dynamics.init", problem_of(tanh, g0=lambda f, c: f * HIDDEN)),
        ("the terminal cost", problem_of(tanh, terminal=lambda u, c: (u * HIDDEN).sum())),
        ("step 1 or its running", problem_of(tanh, running=lambda u, c, t: (u * HIDDEN).sum())),
    ],
)
def test_kkt_refuses_a_hidden_tensor_too(source, problem):
    with pytest.raises(LostGradientError, match=f"{source}.* uses a tensor of shape"):
        bl.kkt(problem, U, C, [U] * 5, [U] * 5)


@every_path
def test_a_hidden_module_parameter_is_refused_and_a_frozen_one_is_a_constant(checkpointing):
    layer = nn.Linear(3, 3, dtype=torch.float64)
    problem = problem_of(lambda u, c, t: torch.tanh(layer(u) * c))
    with pytest.raises(LostGradientError, match="requires grad but is not among its arguments"):
        bl.adjoint(problem, U, C, checkpointing=checkpointing)
    layer.requires_grad_(False)
    found = bl.adjoint(problem, U, C, checkpointing=checkpointing)
    _, truth, _ = plain_gradients(problem, U, C)
    assert_same(found.gradient, truth)


@every_path
@pytest.mark.parametrize(
    ("name", "control"),
    [
        (r"control\['idle'\]", {"c": C, "idle": U}),
        (r"control\['idle'\]\[1\]", {"c": C, "idle": (3, torch.zeros(2))}),
    ],
)
def test_a_part_of_a_shared_control_that_nothing_reads_is_refused_by_name(
    name, control, checkpointing
):
    problem = problem_of(lambda u, c, t: torch.tanh(c["c"] * u))
    with pytest.raises(LostGradientError, match=name + " reaches no cost"):
        bl.adjoint(problem, U, control, checkpointing=checkpointing)


@every_path
@pytest.mark.parametrize(
    ("name", "control"),
    [
        ("control.initial", bl.PerStep([(C,)] * 4, initial=U)),
        (r"control.steps\[2\]\[1\]", bl.PerStep([(C,), (C,), (C, U), (C,)])),
        (r"control.steps\[0\]", bl.PerStep([{"idle": U}, (C,), (C,), (C,)])),
    ],
)
def test_a_part_of_a_control_per_step_that_nothing_reads_is_refused_by_name(
    name, control, checkpointing
):
    problem = problem_of(lambda u, c, t: torch.tanh((c[0] if isinstance(c, tuple) else 2) * u))
    with pytest.raises(LostGradientError, match=name + ".* reaches no cost"):
        bl.adjoint(problem, U, control, checkpointing=checkpointing)


def test_a_shared_part_that_nothing_reads_is_refused_by_name():
    problem = problem_of(lambda u, c, t: torch.tanh(c[0] * u))
    with pytest.raises(LostGradientError, match=r"control.shared reaches no cost"):
        bl.adjoint(problem, U, bl.PerStep([C] * 4, shared=U))


# --- Randomness


def test_a_step_that_is_not_deterministic_is_refused():
    with pytest.raises(ArgumentError, match="steps 3 to 3 of the dynamics gave another state"):
        bl.adjoint(problem_of(Noise()), U, C)


def test_an_init_that_is_not_deterministic_is_refused():
    noise = Noise()
    problem = problem_of(tanh, horizon=1, g0=lambda f, c: noise(f, c, 0))
    with pytest.raises(ArgumentError, match=r"dynamics.init gave another state"):
        bl.adjoint(problem, U, C)


def test_graphs_kept_take_a_step_that_is_not_deterministic():
    found = bl.adjoint(problem_of(Noise()), U, C, checkpointing=GRAPHS)
    cost, truth, _ = plain_gradients(problem_of(Noise()), U, C)
    assert_same(found.cost, cost, rtol=1e-15)
    assert_same(found.gradient, truth)


def dropout(u, c, t):
    return torch.tanh(nn.functional.dropout(c * u, 0.4)) + torch.rand_like(u)


@every_checkpointing
def test_dropout_gives_the_gradient_of_the_realised_trajectory(checkpointing):
    problem = problem_of(
        dropout,
        running=lambda u, c, t: (u**2 * c).sum(),
        g0=lambda f, c: f * torch.rand(3, dtype=f.dtype) * c,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        cost, gradient, observation_gradient = plain_gradients(problem, U, C)
        after_plain = torch.get_rng_state()
        torch.manual_seed(5)
        found = bl.adjoint(problem, U, C, checkpointing=checkpointing)
        after = torch.get_rng_state()
    assert_same(found.cost, cost, rtol=1e-14)
    assert_same(found.gradient, gradient)
    assert_same(found.observation_gradient, observation_gradient)
    assert torch.equal(after, after_plain)


@every_checkpointing
def test_a_failed_sweep_leaves_the_generator_as_the_forward_sweep_left_it(checkpointing):
    problem = problem_of(dropout, terminal=lambda u, c: u)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        plain_cost(problem_of(dropout), U, C)
        after_plain = torch.get_rng_state()
        torch.manual_seed(6)
        with pytest.raises(StructureError):
            bl.adjoint(problem, U, C, checkpointing=checkpointing)
        assert torch.equal(torch.get_rng_state(), after_plain)


# --- What belongs to the caller


@every_path
def test_tensors_their_gradients_and_the_grad_mode_are_left_as_they_were(checkpointing):
    case = case_named("per-step control with theta_0, shared part and running cost")
    observation, control = fresh(case.observation), fresh(case.control)
    leaves = [*tree.leaves_of(control), *tree.leaves_of(observation)]
    for leaf in leaves:
        leaf.grad = torch.full_like(leaf, 7.0)
    versions, values = [x._version for x in leaves], [x.detach().clone() for x in leaves]
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            before = torch.is_grad_enabled()
            bl.adjoint(case.problem, observation, control, checkpointing=checkpointing)
            assert torch.is_grad_enabled() == before
    for leaf, version, value in zip(leaves, versions, values, strict=True):
        assert leaf._version == version
        assert torch.equal(leaf, value)
        assert torch.equal(leaf.grad, torch.full_like(leaf, 7.0))
        assert leaf.requires_grad
        assert leaf.grad_fn is None


@every_path
def test_a_control_with_a_history_is_taken_as_a_point(checkpointing):
    root = fresh(C)
    found = bl.adjoint(problem_of(tanh), U, root * 2, checkpointing=checkpointing)
    _, truth, _ = plain_gradients(problem_of(tanh), U, C * 2)
    assert_same(found.gradient, truth)
    assert root.grad is None


@every_path
def test_everything_is_the_same_under_no_grad(checkpointing):
    case = case_named("complex state, complex and real control")
    arguments = (case.problem, case.observation, case.control)
    found = bl.adjoint(*arguments, checkpointing=checkpointing, keep_multipliers=True)
    with torch.no_grad():
        again = bl.adjoint(*arguments, checkpointing=checkpointing, keep_multipliers=True)
        assert_same(again.gradient, found.gradient, rtol=0)
        assert_same(again.multipliers, found.multipliers, rtol=0)


def test_the_grad_mode_is_restored_when_a_step_raises():
    def step(u, c, t):
        raise RuntimeError("from the user")

    with torch.no_grad():
        with pytest.raises(RuntimeError, match="from the user"):
            bl.adjoint(problem_of(step), U, C)
        assert not torch.is_grad_enabled()


@every_path
def test_steps_may_switch_grad_mode_off_to_stop_gradients_on_purpose(checkpointing):
    def step(u, c, t):
        with torch.no_grad():
            gain = u.norm()
        return torch.tanh(c * u) / (1 + gain)

    problem = problem_of(step)
    control, observation = fresh(C), fresh(U)
    (truth,) = autograd(plain_cost(problem, observation, control), control)
    found = bl.adjoint(problem, U, C, checkpointing=checkpointing)
    assert_same(found.gradient, truth)


@every_path
def test_a_step_may_use_torch_func_inside(checkpointing):
    def step(u, c, t):
        # A gradient step on a potential: what unrolled networks with learned energies do.
        return u - 0.1 * torch.func.grad(lambda v: square(torch.sin(v * c)))(u)

    problem = problem_of(step)
    _, truth, _ = plain_gradients(problem, U, C)
    found = bl.adjoint(problem, U, C, checkpointing=checkpointing)
    assert_same(found.gradient, truth)
