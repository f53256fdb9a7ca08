"""nn.Modules as dynamics and as plain functions, against calling the modules."""

import sys

import pytest
import torch
from choices import CHECKPOINTINGS
from problems import (
    ComplexConv,
    Normed,
    complex_phases,
    cplx,
    normed_phases,
    real,
    seeded,
    square,
)
from reference import assert_same, fresh
from torch import nn

import bilevel as bl
from bilevel import tree
from bilevel.errors import ArgumentError, LostGradientError, StructureError, UnsupportedError

every_checkpointing = pytest.mark.parametrize("checkpointing", CHECKPOINTINGS, ids=repr)


def called_directly(phases, observation):
    state = observation if phases.initial is None else phases.initial(observation)
    for module in phases.modules:
        state = module(state, *phases.context)
    return state


def gradients_of(module):
    return {n: p.grad for n, p in module.named_parameters() if p.requires_grad}


@every_checkpointing
@pytest.mark.parametrize(
    ("make", "observation"),
    [(normed_phases, real(1, 5, 2)), (complex_phases, cplx(2, 1, 4, 4))],
    ids=["batch normalisation", "complex convolutions"],
)
def test_gradients_are_those_of_calling_the_modules(make, observation, checkpointing):
    phases = make()
    problem = bl.ControlProblem(phases, lambda u, c: square(u * u), len(phases.modules))
    found = bl.adjoint(problem, observation, phases.controls(), checkpointing=checkpointing)
    given = fresh(observation)
    cost = square(called_directly(phases, given) ** 2)
    cost.backward()
    assert_same(found.cost, cost.detach(), rtol=1e-14)
    assert_same(found.gradient.steps, tuple(gradients_of(m) for m in phases.modules))
    if phases.initial is not None:
        assert_same(found.gradient.initial, gradients_of(phases.initial))
    assert_same(found.observation_gradient, given.grad)


@every_checkpointing
def test_batch_normalisation_buffers_stay_as_they_were(checkpointing):
    phases = normed_phases()
    before = [{n: b.clone() for n, b in m.named_buffers()} for m in phases.modules]
    problem = bl.ControlProblem(phases, lambda u, c: square(u), 3)
    bl.adjoint(problem, real(1, 5, 2), phases.controls(), checkpointing=checkpointing)
    control = fresh(phases.controls())
    square(bl.rollout(phases, real(1, 5, 2), control, 3, checkpointing=checkpointing)).backward()
    for module, buffers in zip(phases.modules, before, strict=True):
        assert_same(dict(module.named_buffers()), buffers, rtol=0)
        assert int(buffers["norm.num_batches_tracked"]) == 0


def test_modules_in_evaluation_mode_read_their_running_statistics():
    phases = normed_phases()
    called_directly(phases, real(1, 5, 2))  # moves the running statistics
    for module in phases.modules:
        module.eval()
    truth = called_directly(phases, real(3, 4, 2)).detach()
    assert_same(bl.rollout(phases, real(3, 4, 2), phases.controls(), 3), truth, rtol=1e-14)


def test_controls_are_detached_copies_of_the_trainable_parameters():
    phases = normed_phases()
    control = phases.controls()
    assert "frozen" not in control.steps[0]
    assert set(control.steps[0]) == {"linear.weight", "linear.bias", "norm.weight", "norm.bias"}
    weight = phases.modules[0].linear.weight
    assert torch.equal(control.steps[0]["linear.weight"], weight)
    assert not control.steps[0]["linear.weight"].requires_grad
    control.steps[0]["linear.weight"].zero_()
    assert bool(weight.abs().min() > 0)


def test_loading_controls_makes_modules_that_compute_the_same():
    source = normed_phases()
    target = seeded(
        lambda: bl.Phases(
            [Normed() for _ in range(3)], initial=nn.Linear(2, 3, dtype=torch.float64)
        ),
        5,
    )
    x = real(1, 5, 2)
    truth = called_directly(source, x).detach()
    assert not torch.allclose(called_directly(target, x).detach(), truth)
    target.load(source.controls())
    assert torch.equal(called_directly(target, x).detach(), truth)
    assert_same(target.controls(), source.controls(), rtol=0)
    assert target.modules[0].linear.weight.requires_grad


def test_a_solved_control_goes_back_into_the_modules():
    phases = complex_phases()
    x = cplx(2, 1, 4, 4)
    problem = bl.ControlProblem(phases, lambda u, c: square(u), 3)
    solution = bl.ControlSolver(problem).solve(phases.controls(), x, steps=3)
    before = square(called_directly(phases, x)).item()
    phases.load(solution.control)
    assert square(called_directly(phases, x)).item() == pytest.approx(solution.cost, rel=1e-13)
    assert solution.cost < before


def renamed(control):
    values = dict(control.steps[1])
    values["weights"] = values.pop("norm.weight")
    return bl.PerStep([control.steps[0], values, control.steps[2]], control.initial)


def reshaped(control):
    values = {**control.steps[2], "linear.bias": torch.zeros(4, dtype=torch.float64)}
    return bl.PerStep([*control.steps[:2], values], control.initial)


MISMATCHES = {
    "too few steps": (
        lambda c: bl.PerStep(c.steps[:2], c.initial),
        "one entry per step, 3 .* got 2",
    ),
    "another name": (renamed, "control must be .*norm.weight.*got .*'weights'"),
    "another shape": (
        reshaped,
        r"control.steps\[2\]\['linear.bias'\] must be float64\[3\] on cpu, got float64\[4\]",
    ),
    "no initial": (lambda c: bl.PerStep(c.steps), "control must be "),
    "a part too many": (
        lambda c: bl.PerStep(c.steps, c.initial, real(4, 1)),
        "control.shared must be NoneType",
    ),
    "no PerStep": (lambda c: c.steps, "control must be .*PerStep"),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_loading_what_does_not_match_says_so_and_changes_nothing(mismatch):
    change, message = MISMATCHES[mismatch]
    phases = normed_phases()
    before = phases.controls()
    other = tree.map_leaves(lambda x: x if x is None else x + 1, before)
    with pytest.raises(StructureError, match=message):
        phases.load(change(other))
    assert_same(phases.controls(), before, rtol=0)


def test_a_parameter_shared_by_two_steps_is_refused():
    layer = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="step 1 and step 3 share the parameter 'weight'"):
        bl.Phases([layer, nn.Linear(2, 2), layer])


def test_a_parameter_shared_by_a_step_and_the_initial_module_is_refused():
    layer = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="step 2 and initial share the parameter 'weight'"):
        bl.Phases([nn.Linear(2, 2), layer], initial=layer)


def test_frozen_modules_may_be_shared_and_are_constants():
    layer = nn.Linear(3, 3, dtype=torch.float64).requires_grad_(False)

    def phase(own):
        return nn.Sequential(layer, nn.Tanh(), own)

    phases = seeded(
        lambda: bl.Phases([phase(nn.Linear(3, 3, dtype=torch.float64)) for _ in range(2)]), 6
    )
    x = real(7, 3)
    problem = bl.ControlProblem(phases, lambda u, c: square(u), 2)
    found = bl.adjoint(problem, x, phases.controls())
    assert set(found.gradient.steps[0]) == {"2.weight", "2.bias"}
    square(called_directly(phases, x)).backward()
    assert_same(found.gradient.steps, tuple(gradients_of(m) for m in phases.modules))


def test_tied_weights_inside_a_module_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False, dtype=torch.float64)
            self.b = nn.Linear(3, 3, bias=False, dtype=torch.float64)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    phases = bl.Phases([Tied()])
    x = real(8, 3)
    problem = bl.ControlProblem(phases, lambda u, c: square(u), 1)
    found = bl.adjoint(problem, x, phases.controls())
    square(called_directly(phases, x)).backward()
    assert_same(found.gradient.steps[0], {"a.weight": phases.modules[0].a.weight.grad})


@every_checkpointing
def test_a_context_that_requires_grad_is_refused(checkpointing):
    phases = bl.Phases(
        [seeded(ComplexConv, 9) for _ in range(1)], context=(fresh(cplx(10, 1, 4, 4)),)
    )
    problem = bl.ControlProblem(phases, lambda u, c: square(u), 1)
    with pytest.raises(LostGradientError, match=r"tensor of shape \(1, 4, 4\)"):
        bl.adjoint(problem, cplx(2, 1, 4, 4), phases.controls(), checkpointing=checkpointing)


@every_checkpointing
def test_a_control_that_lacks_a_trainable_parameter_is_refused(checkpointing):
    # functional_call would fall back on the module's own parameter and lose its gradient.
    phases = complex_phases()
    control = phases.controls()
    del control.steps[1]["gain"]
    problem = bl.ControlProblem(phases, lambda u, c: square(u), 3)
    with pytest.raises(LostGradientError, match=r"tensor of shape \(\) that requires grad"):
        bl.adjoint(problem, cplx(2, 1, 4, 4), control, checkpointing=checkpointing)


def test_functional_gives_the_value_and_gradient_of_the_module():
    model = seeded(Normed, 11)
    params, call = bl.functional(model)
    x = real(12, 5, 3)
    assert set(params) == {"linear.weight", "linear.bias", "norm.weight", "norm.bias"}
    attached = fresh(params)
    value = square(call(attached, x))
    found = torch.autograd.grad(value, list(attached.values()))
    before = {n: b.clone() for n, b in model.named_buffers()}
    square(model(x)).backward()
    truth = gradients_of(model)
    for name, gradient in zip(attached, found, strict=True):
        assert_same(gradient, truth[name], rtol=1e-14)
    assert int(before["norm.num_batches_tracked"]) == 0


def test_functional_hands_out_copies_and_reads_what_it_is_given():
    model = nn.Linear(2, 1, bias=False)
    params, call = bl.functional(model)
    weight = model.weight.detach().clone()
    params["weight"].fill_(2.0)
    assert torch.equal(model.weight.detach(), weight)
    assert call(params, torch.tensor([3.0, 4.0])).tolist() == [14.0]


def test_functional_as_one_network_shared_by_all_steps_has_the_gradient_of_the_plain_loop():
    model = seeded(lambda: nn.Linear(3, 3, dtype=torch.float64), 13)
    params, call = bl.functional(model)
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: torch.tanh(call(c, u))), lambda u, c: square(u), 4
    )
    found = bl.adjoint(problem, real(14, 3), params)
    state = real(14, 3)
    for _ in range(4):
        state = torch.tanh(model(state))
    square(state).backward()
    assert_same(found.gradient, gradients_of(model))


class Wrapped(nn.Module):
    """In the place of DistributedDataParallel, which cannot be made without other processes."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("name", ["DistributedDataParallel", "FullyShardedDataParallel"])
def test_modules_that_average_in_their_own_backward_are_refused_by_name(name, monkeypatch):
    room = "torch.nn.parallel" if name.startswith("Distributed") else "torch.distributed.fsdp"
    fake = type(sys)(room)
    setattr(fake, name, Wrapped)
    monkeypatch.setitem(sys.modules, room, fake)
    wrapped = Wrapped(nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match=r"the module is a Wrapped, .* \(model.module\)"):
        bl.functional(wrapped)
    with pytest.raises(UnsupportedError, match="1 is a Wrapped"):
        bl.functional(nn.Sequential(nn.Linear(2, 2), wrapped))
    with pytest.raises(UnsupportedError, match="the module is a Wrapped"):
        bl.Phases([nn.Linear(2, 2), wrapped])
    assert [*bl.functional(wrapped.module)[0]] == ["weight", "bias"]


@pytest.mark.slow
def test_a_real_distributed_module_is_refused(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        with pytest.raises(UnsupportedError, match="the module is a DistributedDataParallel"):
            bl.functional(wrapped)
    finally:
        torch.distributed.destroy_process_group()


class Scaled(nn.Module):
    """Takes an option by name; part of it is frozen."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 1).requires_grad_(requires_grad=False)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x, *, scale=1.0):
        return scale * self.b(self.norm(self.a(x)))


def test_a_function_takes_options_by_name_and_prints_what_is_constant():
    model = Scaled()
    params, call = bl.functional(model)
    x = torch.randn(5, 2)
    torch.testing.assert_close(call(params, x, scale=3.0), 3 * call(params, x))
    assert call.constants == ("b.weight", "b.bias")
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert call.cloned == tuple(f"norm.{name}" for name in buffers)
    assert "buffers, cloned: norm.running_mean" in repr(call)
    assert model.norm.num_batches_tracked == 0


def test_a_solution_goes_back_into_the_model():
    model = Scaled()
    params, call = bl.functional(model)
    x, y = torch.randn(20, 2), torch.randn(20, 1)
    problem = bl.BilevelProblem(
        lambda w, a, b: (
            ((call(w, x) - y) ** 2).mean() + a.exp() * sum(p.square().sum() for p in w.values())
        ),
        lambda w, a, b: ((call(w, x) - y) ** 2).mean(),
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.1), 5, certificate=None)
    found = solver.solve(params, torch.tensor(-3.0), steps=2)
    frozen = model.b.weight.clone()
    found.load_into(model)
    torch.testing.assert_close(model(x), call(found.params, x))
    assert torch.equal(model.b.weight, frozen)
    with pytest.raises(StructureError, match="load_into takes the trainable parameters"):
        found.load_into(nn.Linear(2, 2))
    step = bl.Map(lambda u, c, t: call(c, u).expand(-1, 2))
    control = bl.ControlSolver(bl.ControlProblem(step, lambda u, c: u.square().sum(), 2)).solve(
        params, x, steps=2
    )
    control.load_into(model)
    torch.testing.assert_close(model(x), call(control.control, x))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda params: list(params.values()), "params by name .* got list"),
        (lambda params: nn.Linear(3, 2), "params by name .* got Linear"),
        (lambda params: torch.zeros(2, 3), r"params by name .* got float32\[2, 3\] on cpu"),
        (lambda params: {"weight": params["weight"]}, "must have a tensor for 'bias', got weight"),
        (
            lambda params: {name: torch.tensor(0.0) for name in params},
            r"params\['weight'\] must have the shape \(2, 3\) .* params and control swapped",
        ),
    ],
    ids=["list", "module", "tensor", "some", "a control"],
)
def test_a_function_of_a_module_takes_its_params_and_nothing_else(params, message):
    given, call = bl.functional(nn.Linear(3, 2))
    with pytest.raises(StructureError, match=message):
        call(params(given), torch.ones(3))


@pytest.mark.parametrize(
    ("model", "came"), [(nn.Linear, "the class Linear"), (lambda x: x, "function")]
)
def test_what_is_no_module_is_refused(model, came):
    with pytest.raises(ArgumentError, match=f"model must be a torch.nn.Module, got {came}"):
        bl.functional(model)


def test_a_function_of_a_module_says_what_draws():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Dropout(0.0))
    _, call = bl.functional(model)
    assert repr(call) == "ModuleFunction(Sequential; in training mode, drawing: 1 (Dropout))"
    model.eval()
    assert repr(call) == "ModuleFunction(Sequential)"
