"""The final state as a function that autograd differentiates by a multiplier sweep."""

import pytest
import torch
from choices import CHECKPOINTINGS, PATHS, covering
from problems import C128, CASES, TELLING, Custom, case_named, cplx, real, square
from reference import (
    assert_same,
    assert_same_vector,
    autograd,
    fresh,
    plain_gradients,
    plain_states,
    random_like,
    wanted,
)
from steps import Graphs, Noise
from torch.autograd import gradcheck, gradgradcheck

import bilevel as bl
from bilevel import tree
from bilevel.errors import ArgumentError, LostGradientError, StructureError, UnsupportedError
from bilevel.sweeps.memory import LiveBytes

every_checkpointing = pytest.mark.parametrize("checkpointing", CHECKPOINTINGS, ids=repr)
every_path = pytest.mark.parametrize("checkpointing", PATHS, ids=repr)
every_pair = pytest.mark.parametrize(("case", "checkpointing"), covering(CASES, TELLING[-1:]))
STATES, GRAPHS = CHECKPOINTINGS[:2]
C, U = 0.5 * real(1, 3), real(2, 3)
TANH = bl.Map(lambda u, c, t: torch.tanh(c * u + t))


def rollout_gradients(case, checkpointing, cotangent):
    observation, control = fresh(case.observation), fresh(case.control)
    final = bl.rollout(
        case.problem.dynamics,
        observation,
        control,
        case.problem.horizon,
        checkpointing=checkpointing,
    )
    return tree.detach(final), *autograd(tree.inner(cotangent, final), control, observation)


@pytest.mark.parametrize(("case", "checkpointing"), covering(CASES, TELLING))
def test_value_and_gradients_are_those_of_the_plain_loop(case, checkpointing):
    observation, control = fresh(case.observation), fresh(case.control)
    truth = plain_states(case.problem.dynamics, observation, control, case.problem.horizon)[-1]
    cotangent = random_like(truth, torch.Generator().manual_seed(3))
    gradients = autograd(tree.inner(cotangent, truth), control, observation)
    final, *found = rollout_gradients(case, checkpointing, cotangent)
    assert_same(final, tree.detach(truth), rtol=0)
    assert_same(found[0], gradients[0])
    assert_same(found[1], gradients[1])


@every_path
@pytest.mark.parametrize("dtype", [torch.float64, C128])
def test_gradcheck_holds(dtype, checkpointing):
    generator = torch.Generator().manual_seed(4)
    inputs = [
        torch.randn(3, dtype=dtype, generator=generator, requires_grad=True) for _ in range(5)
    ]

    def final(f, *controls):
        dynamics = Custom(
            lambda u, c, t: torch.sin(c[0] * u) + c[1] * u.conj(), lambda f, c: f * c.conj()
        )
        theta = bl.PerStep(controls[:2], initial=controls[2], shared=controls[3])
        return bl.rollout(dynamics, f, theta, 2, checkpointing=checkpointing)

    assert gradcheck(final, inputs)


@every_path
@pytest.mark.parametrize("dtype", [torch.float64, C128])
def test_gradgradcheck_holds(dtype, checkpointing):
    generator = torch.Generator().manual_seed(5)
    f, c = (torch.randn(2, dtype=dtype, generator=generator, requires_grad=True) for _ in "fc")
    step = bl.Map(lambda u, c, t: torch.sin(c * u) + c * u.conj())
    assert gradgradcheck(
        lambda f, c: bl.rollout(step, f, c, 3, checkpointing=checkpointing), (f, c)
    )


def second_derivatives(final, observation, control, cotangent, generator):
    """Of Re<gradient, w>, in the observation, the control and the cotangent."""
    inputs = [*wanted(observation), *wanted(control)]
    pairs = [(y, v) for y, v in zip(wanted(final), cotangent, strict=True) if y.requires_grad]
    ys, vs = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(ys, inputs, vs, create_graph=True, allow_unused=True)
    value = sum(
        (torch.randn(g.shape, dtype=g.dtype, generator=generator).conj() * g).real.sum()
        if g is not None
        else torch.randn(x.shape, dtype=x.dtype, generator=generator).real.sum() * 0
        for x, g in zip(inputs, gradients, strict=True)
    )
    return autograd(value, observation, control, cotangent)


@every_pair
def test_second_derivatives_are_those_of_the_plain_loop(case, checkpointing):
    observation, control = fresh(case.observation), fresh(case.control)
    dynamics, horizon = case.problem.dynamics, case.problem.horizon
    plain = plain_states(dynamics, observation, control, horizon)[-1]
    generator = torch.Generator()
    vector = random_like(plain, generator.manual_seed(3))
    cotangent = fresh([v for v in tree.leaves_of(vector) if v is not None])
    truth = second_derivatives(plain, observation, control, cotangent, generator.manual_seed(4))
    final = bl.rollout(dynamics, observation, control, horizon, checkpointing=checkpointing)
    found = second_derivatives(final, observation, control, cotangent, generator.manual_seed(4))
    # A bias before a normalisation has derivatives that are zero but for rounding.
    for part, expected in zip(found, truth, strict=True):
        assert_same_vector(part, expected)


def test_a_second_derivative_replays_the_randomness_of_the_forward():
    step = bl.Map(lambda u, c, t: torch.tanh(c * u * torch.rand(3, dtype=u.dtype)))
    products = []
    for roll in (plain_states, bl.rollout):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(9)
            control = fresh(C)
            final = roll(step, U, control, 4)
            (g,) = torch.autograd.grad(
                square(final[-1] if roll is plain_states else final), control, create_graph=True
            )
            torch.rand(5)
            products.append(torch.autograd.grad(square(g), control)[0])
    assert_same(products[1], products[0])


@every_path
def test_backward_fills_grad_as_the_plain_loop_does(checkpointing):
    case = case_named("phases with complex convolutions")
    found, plain = fresh(case.control), fresh(case.control)
    for _ in range(2):  # .grad accumulates
        state = bl.rollout(
            case.problem.dynamics, case.observation, found, 3, checkpointing=checkpointing
        )
        square(state).backward()
        square(plain_states(case.problem.dynamics, case.observation, plain, 3)[-1]).backward()
    for leaf, truth in zip(wanted(found), wanted(plain), strict=True):
        assert_same(leaf.grad, truth.grad)


@every_path
def test_training_with_torch_optim_and_a_loss_that_reads_the_control_is_that_of_the_plain_loop(
    checkpointing,
):
    def train(final):
        control = fresh({"c": C, "d": U})
        optimizer = torch.optim.Adam([control["c"], control["d"]], lr=0.05)
        for _ in range(10):
            optimizer.zero_grad()
            loss = square(final(control)) + (control["c"] ** 2 * control["d"]).sum()
            loss.backward()
            optimizer.step()
        return tree.detach(control)

    step = bl.Map(lambda u, c, t: torch.tanh(c["c"] * u + t * c["d"]))
    truth = train(lambda control: plain_states(step, U, control, 4)[-1])
    found = train(lambda control: bl.rollout(step, U, control, 4, checkpointing=checkpointing))
    assert_same(found, truth, rtol=1e-11)


@every_path
def test_integer_leaves_come_out_unchanged_and_without_gradient(checkpointing):
    case = case_named("tree state with integers")
    control = fresh(case.control)
    final = bl.rollout(
        case.problem.dynamics, case.observation, control, 4, checkpointing=checkpointing
    )
    assert final["k"] == 2
    assert final["count"].tolist() == [1, 2, 3]
    assert final["on"].tolist() == [True, False, True]
    assert not final["count"].requires_grad
    assert final["x"].requires_grad
    assert final["z"].requires_grad


@every_checkpointing
def test_a_graph_that_is_retained_can_be_pulled_back_twice(checkpointing):
    control = fresh(C)
    final = bl.rollout(TANH, U, control, 4, checkpointing=checkpointing)
    vectors = [real(6, 3), real(7, 3)]
    found = [torch.autograd.grad(final, control, v, retain_graph=True)[0] for v in vectors]
    plain = plain_states(TANH, U, control, 4)[-1]
    for vector, gradient in zip(vectors, found, strict=True):
        (truth,) = torch.autograd.grad(plain, control, vector, retain_graph=True)
        assert_same(gradient, truth)


def test_the_final_state_may_be_written_in_place_without_harm_to_the_gradient():
    control, twin = fresh(C), fresh(C)
    final = bl.rollout(TANH, U, control, 4)
    with torch.no_grad():
        final.add_(1.0)
    final.sum().backward()
    plain_states(TANH, U, twin, 4)[-1].sum().backward()
    assert_same(control.grad, twin.grad)


@pytest.mark.parametrize("which", ["control", "observation"])
def test_a_write_in_place_between_forward_and_backward_is_refused(which):
    control, observation = fresh(C), fresh(U)
    final = bl.rollout(TANH, observation, control, 4)
    changed = {"control": control, "observation": observation}[which]
    with torch.no_grad():
        changed.add_(1.0)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        final.sum().backward()


def test_a_third_derivative_with_states_kept_is_refused():
    control = fresh(C)
    loss = square(bl.rollout(TANH, U, control, 4))
    (gradient,) = torch.autograd.grad(loss, control, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), control, create_graph=True)
    with pytest.raises(UnsupportedError, match=r"third.*checkpointing=Checkpointing\(block=None"):
        torch.autograd.grad(second.sum(), control)


def test_a_first_derivative_made_with_create_graph_is_exact():
    control = fresh(C)
    (found,) = torch.autograd.grad(
        square(bl.rollout(TANH, U, control, 4)), control, create_graph=True
    )
    (truth,) = torch.autograd.grad(square(plain_states(TANH, U, control, 4)[-1]), control)
    assert_same(found.detach(), truth)


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda c: square(f(c)))(C),
    "vmap": lambda f: torch.func.vmap(f)(torch.stack([C, U])),
    "jacrev": lambda f: torch.func.jacrev(f)(C),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_with_states_kept_is_refused(name):
    with pytest.raises(UnsupportedError, match=r"torch.func.*Checkpointing\(block=None\)"):
        TRANSFORMS[name](lambda c: bl.rollout(TANH, U, c, 4))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_one_state_is_kept_at_a_time(mode):
    u, c = real(1, 1000), real(2, 1000)
    problem = bl.ControlProblem(TANH, lambda u, c: square(u), 50, lambda u, c, t: square(u * c))
    expected = plain_states(TANH, u, c, 50)[-1]
    with mode(), LiveBytes() as live:
        leaf = u.clone()
        assert_same(bl.rollout(TANH, leaf, c, 50), expected)
        bl.total_cost(problem, leaf, c)
        assert live.peak < 8 * u.nbytes


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_passes_through_with_graphs_kept(name):
    found = TRANSFORMS[name](lambda c: bl.rollout(TANH, U, c, 4, checkpointing=GRAPHS))
    assert_same(found, TRANSFORMS[name](lambda c: plain_states(TANH, U, c, 4)[-1]))


@every_path
def test_gradients_are_computed_for_what_requires_them_only(checkpointing):
    control = bl.PerStep([C.clone(), fresh(C), C.clone(), C.clone()])
    final = bl.rollout(TANH, U, control, 4, checkpointing=checkpointing)
    final.sum().backward()
    assert [c.grad is None for c in control.steps] == [True, False, True, True]
    plain = fresh(C)
    steps = bl.PerStep([C, plain, C, C])
    (truth,) = torch.autograd.grad(plain_states(TANH, U, steps, 4)[-1].sum(), plain)
    assert_same(control.steps[1].grad, truth)


@every_path
def test_a_part_of_the_control_that_nothing_reads_gets_no_gradient(checkpointing):
    step = bl.Map(lambda u, c, t: torch.tanh(c["c"] * u))
    control = fresh({"c": C, "idle": U})
    bl.rollout(step, U, control, 4, checkpointing=checkpointing).sum().backward()
    assert control["idle"].grad is None


@every_path
def test_without_inputs_that_require_grad_the_final_state_is_a_constant(checkpointing):
    final = bl.rollout(TANH, U, C, 4, checkpointing=checkpointing)
    assert not final.requires_grad
    with torch.no_grad():
        again = bl.rollout(TANH, U, fresh(C), 4, checkpointing=checkpointing)
    assert not again.requires_grad
    assert torch.equal(again, final)


@every_path
def test_gradients_flow_on_to_what_the_control_was_made_from(checkpointing):
    rates = fresh(real(8, 4, 3))
    control = bl.PerStep.unstack(torch.exp(rates))
    bl.rollout(TANH, U, control, 4, checkpointing=checkpointing).sum().backward()
    plain = fresh(real(8, 4, 3))
    plain_states(TANH, U, bl.PerStep(list(torch.exp(plain))), 4)[-1].sum().backward()
    assert_same(rates.grad, plain.grad)


@every_path
def test_two_rollouts_in_a_row_differentiate_as_one(checkpointing):
    control, plain = fresh(C), fresh(C)
    state = bl.rollout(TANH, U, control, 2, checkpointing=checkpointing)
    bl.rollout(TANH, state, control, 3, checkpointing=checkpointing).sum().backward()
    middle = plain_states(TANH, U, plain, 2)[-1]
    plain_states(TANH, middle, plain, 3)[-1].sum().backward()
    assert_same(control.grad, plain.grad)


def test_states_are_kept_until_backward_and_then_freed():
    graphs, control = Graphs(), fresh(C)
    with graphs.hooks:
        final = bl.rollout(TANH, U, control, 6)
    # u(0), ..., u(6), the observation and the control.
    assert len(graphs.live) == 9
    final.sum().backward()
    assert len(graphs.live) == 0


def test_nothing_is_kept_when_nothing_requires_grad():
    graphs = Graphs()
    with graphs.hooks:
        final = bl.rollout(TANH, U, C, 6)
    assert len(graphs.live) == 0
    assert not final.requires_grad


def test_backward_keeps_the_graph_of_one_step_at_a_time():
    graphs, seen = Graphs(), []

    def step(u, c, t):
        seen.append(len(graphs.live))
        return torch.tanh(c * u + t)

    with graphs.hooks:
        bl.rollout(bl.Map(step), U, fresh(C), 6).sum().backward()
    assert seen[:6] == [0] * 6
    assert seen[6:] == [9] * 8  # what the rollout saved, and no graph of another step


@every_checkpointing
def test_dropout_gives_the_gradient_of_the_realised_trajectory(checkpointing):
    step = bl.Map(lambda u, c, t: torch.tanh(torch.nn.functional.dropout(c * u + t, 0.4)))
    control, plain = fresh(C), fresh(C)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        plain_states(step, U, plain, 5)[-1].sum().backward()
        after_plain = torch.get_rng_state()
        torch.manual_seed(9)
        final = bl.rollout(step, U, control, 5, checkpointing=checkpointing)
        torch.rand(10)  # the backward must not depend on where the generator stands now
        between = torch.get_rng_state()
        final.sum().backward()
        assert torch.equal(torch.get_rng_state(), between)
        torch.manual_seed(9)
        bl.rollout(step, U, control, 5, checkpointing=checkpointing)
        assert torch.equal(torch.get_rng_state(), after_plain)
    assert_same(control.grad, plain.grad)


def test_a_step_that_is_not_deterministic_is_refused_in_backward():
    final = bl.rollout(bl.Map(Noise()), U, fresh(C), 1)
    with pytest.raises(ArgumentError, match="steps 1 to 1 of the dynamics gave another state"):
        final.sum().backward()


def test_a_hidden_tensor_is_refused_with_states_kept_and_differentiated_with_graphs_kept():
    hidden = fresh(U)
    step = bl.Map(lambda u, c, t: torch.tanh(c * u + hidden))
    with pytest.raises(LostGradientError, match="step 1 of the dynamics uses a tensor of shape"):
        bl.rollout(step, U, C, 4)
    (found,) = torch.autograd.grad(bl.rollout(step, U, C, 4, checkpointing=GRAPHS).sum(), hidden)
    (truth,) = torch.autograd.grad(plain_states(step, U, C, 4)[-1].sum(), hidden)
    assert_same(found, truth)


@every_path
def test_wrong_arguments_are_refused(checkpointing):
    def run(dynamics=TANH, control=C, horizon=4):
        return bl.rollout(dynamics, U, control, horizon, checkpointing=checkpointing)

    with pytest.raises(ArgumentError, match="horizon must be a whole number >= 0, got -1"):
        run(horizon=-1)
    with pytest.raises(StructureError, match=r"one entry per step, 4 .* got 1"):
        run(control=bl.PerStep([C]))
    with pytest.raises(StructureError, match=r"step 1 must return.*u\(1\).*float64\[1\]"):
        run(dynamics=bl.Map(lambda u, c, t: u[:1]))


@every_path
def test_an_error_of_the_step_is_not_disguised(checkpointing):
    def step(u, c, t):
        raise RuntimeError("from the user")

    with pytest.raises(RuntimeError, match="from the user"):
        bl.rollout(bl.Map(step), U, fresh(C), 2, checkpointing=checkpointing)


def test_a_complex_cotangent_gives_the_conjugate_convention_of_torch():
    # grad of Re<v, c u> in c is conj(u) v.
    c, u, v = fresh(cplx(10, 3)), cplx(11, 3), cplx(12, 3)
    final = bl.rollout(bl.Map(lambda u, c, t: c * u), u, c, 1)
    (found,) = torch.autograd.grad(final, c, v)
    assert_same(found, u.conj() * v, rtol=1e-15)


@every_pair
def test_the_total_cost_and_its_gradients_are_those_of_the_plain_loop(case, checkpointing):
    cost, *truth = plain_gradients(case.problem, case.observation, case.control)
    observation, control = fresh(case.observation), fresh(case.control)
    found = bl.total_cost(case.problem, observation, control, checkpointing=checkpointing)
    assert_same(found.detach(), cost)
    for gradient, expected in zip(autograd(found, control, observation), truth, strict=True):
        assert_same(gradient, expected)


@every_path
def test_the_total_cost_is_differentiable_twice(checkpointing):
    problem = bl.ControlProblem(
        TANH, lambda u, c: (c * u).square().sum(), 3, lambda u, c, t: t * (c * u.square()).sum()
    )
    f, c = fresh(U), fresh(C)
    assert gradgradcheck(
        lambda f, c: bl.total_cost(problem, f, c, checkpointing=checkpointing), (f, c)
    )


def test_a_cost_that_is_no_scalar_is_refused():
    for terminal, running, name in (
        (lambda u, c: u, None, "the terminal cost"),
        (lambda u, c: u.sum(), lambda u, c, t: u, "the running cost at t = 1"),
    ):
        problem = bl.ControlProblem(TANH, terminal, 2, running)
        with pytest.raises(StructureError, match=f"{name} must return a real scalar"):
            bl.total_cost(problem, U, C)
