"""What is compared when a block is evaluated again."""

from functools import partial

import numpy
import pytest
import torch
from problems import real, square

import bilevel as bl
from bilevel.errors import ArgumentError


def swept(step, state, horizon=4):
    problem = bl.ControlProblem(bl.Map(step), lambda u, c: square(u["x"]), horizon)
    return bl.adjoint(problem, state, real(2, 1)[0])


def fresh_draws(size, scale, dtype):
    generator = torch.Generator().manual_seed(3)
    return lambda: (scale * torch.rand(size, generator=generator)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.bfloat16, 0.08), (torch.float16, 0.03), (torch.float32, 3e-3), (torch.float64, 1e-9)],
    ids=str,
)
def test_draws_of_a_few_digits_are_refused(dtype, scale):
    draw = fresh_draws(4, scale, dtype)
    start = {"x": torch.ones(4, dtype=dtype)}
    with pytest.raises(ArgumentError, match="gave another state when evaluated again"):
        swept(lambda u, c, t: {"x": u["x"] * c.to(dtype) + draw()}, start)


def test_integers_are_compared_exactly():
    generator = torch.Generator().manual_seed(3)

    def step(u, c, t):
        return {"x": u["x"] * c, "n": u["n"] + torch.randint(1000, (), generator=generator)}

    with pytest.raises(ArgumentError, match="gave another state"):
        swept(step, {"x": real(1, 3), "n": torch.tensor(0)})


def test_one_entry_of_many_counts():
    generator = torch.Generator().manual_seed(3)

    def step(u, c, t):
        x = u["x"] * c
        return {"x": torch.cat([x[:-1], x[-1:] + torch.rand(1, generator=generator)])}

    with pytest.raises(ArgumentError, match="gave another state"):
        swept(step, {"x": torch.ones(100_000)})


def test_rounding_is_not_refused():
    calls = []

    def step(u, c, t):
        calls.append(t)
        return {"x": u["x"] * c * (1 + (len(calls) % 3) * 1e-15)}

    swept(step, {"x": real(1, 3)})


def straight_through(mask):
    """A random mask in the backward alone: the state is the same at every evaluation."""

    def step(u, c, t):
        v = torch.tanh(c * u)
        return v.detach() + (v - v.detach()) * mask(v)

    return step


def own_mask(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda v: torch.rand(v.shape, generator=generator, dtype=v.dtype) < 0.5


def signs(seed):
    numbers = numpy.random.default_rng(seed)
    return lambda v: torch.from_numpy(numpy.sign(numbers.standard_normal(v.shape))).to(v)


def masked(step, horizon, checkpointing):
    problem = bl.ControlProblem(bl.Map(step), lambda u, c: square(u), horizon)
    return bl.adjoint(problem, real(1, 40), real(2, 1)[0], checkpointing=checkpointing)


@pytest.mark.parametrize("mask", [own_mask, signs])
@pytest.mark.parametrize("horizon", [2, 5, 40])
def test_a_random_straight_through_estimate_is_refused(mask, horizon):
    step = straight_through(mask(3))
    for _ in range(2):  # a step that was refused once is no better known
        with pytest.raises(ArgumentError, match="the same state with another gradient"):
            masked(step, horizon, bl.Checkpointing(block=1))


def test_its_graphs_may_be_kept():
    masked(straight_through(own_mask(3)), 5, bl.Checkpointing(block=None))


def test_an_estimate_that_draws_from_the_default_generator_is_replayed():
    step = straight_through(lambda v: torch.rand_like(v) < 0.5)
    found = []
    for chosen in (bl.Checkpointing(), bl.Checkpointing(block=None), bl.Checkpointing(2, 1)):
        torch.manual_seed(5)
        found.append(masked(step, 5, chosen).gradient)
    torch.testing.assert_close(found[0], found[1], rtol=1e-13, atol=0)
    torch.testing.assert_close(found[2], found[1], rtol=1e-13, atol=0)


def test_gradients_are_compared_the_first_time_only():
    calls = []

    def step(u, c, t):
        calls.append(t)
        return torch.tanh(c * u)

    counts = []
    for _ in range(3):
        calls.clear()
        masked(step, 5, bl.Checkpointing())
        counts.append(len(calls))
    assert counts == [11, 9, 9]


def own_draw(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda u: torch.rand(u.shape, generator=generator, dtype=u.dtype)


def numpy_draw(seed):
    numbers = numpy.random.default_rng(seed)
    return lambda u: torch.from_numpy(numbers.random(u.shape)).to(u)


def costly(running, checkpointing, ask=bl.adjoint):
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: torch.tanh(c * u)), lambda u, c: square(u), 5, running
    )
    u, c = real(1, 4), real(2, 1)[0]
    if ask is bl.hvp:
        return bl.hvp(problem, u, c, c, checkpointing=checkpointing)
    if ask is bl.total_cost:
        c = c.clone().requires_grad_()
        return torch.autograd.grad(bl.total_cost(problem, u, c, checkpointing=checkpointing), c)
    return bl.adjoint(problem, u, c, checkpointing=checkpointing)


@pytest.mark.parametrize("draw", [own_draw, numpy_draw])
@pytest.mark.parametrize("ask", [bl.adjoint, bl.hvp, bl.total_cost])
@pytest.mark.parametrize("chosen", [bl.Checkpointing(), bl.Checkpointing(2, 1)], ids=repr)
def test_a_running_cost_that_draws_from_elsewhere_is_refused(draw, ask, chosen):
    drawn = draw(3)

    def running(u, c, t):
        return (drawn(u) * u).sum() * c

    for _ in range(2):
        with pytest.raises(
            ArgumentError, match=r"running cost at t = \d gave another|another state"
        ):
            costly(running, chosen, ask)


def test_a_running_cost_with_a_random_gradient_alone_is_refused():
    drawn = own_draw(3)

    def running(u, c, t):
        v = (c * u).sum()
        return v.detach() + (v - v.detach()) * drawn(u)[0]

    with pytest.raises(ArgumentError, match="its running cost gave the same state with another"):
        costly(running, bl.Checkpointing())


def test_a_running_cost_of_another_sweep_is_looked_at_though_the_step_is_known():
    step, drawn = (lambda u, c, t: c * u), own_draw(3)
    u, c = real(1, 4), real(2, 1)[0]
    for running in (lambda u, c, t: square(u), lambda u, c, t: (drawn(u) * u).sum()):
        problem = bl.ControlProblem(bl.Map(step), lambda u, c: square(u), 5, running)
        if running(u, c, 1) == running(u, c, 1):
            bl.adjoint(problem, u, c)
            continue
        with pytest.raises(ArgumentError, match="running cost at t"):
            bl.adjoint(problem, u, c)


def test_graphs_kept_serve_a_cost_that_draws_from_elsewhere():
    found = []
    for chosen in (None, bl.Checkpointing(block=None)):
        drawn, J = own_draw(3), 0.0

        def running(u, c, t, drawn=drawn):
            return (drawn(u) * u).sum() * c

        if chosen is not None:
            found.append(costly(running, chosen).gradient)
            continue
        u, c = real(1, 4), real(2, 1)[0].clone().requires_grad_()
        for t in range(1, 6):
            J = J + running(u, c, t)
            u = torch.tanh(c * u)
        found.append(torch.autograd.grad(J + square(u), c)[0])
    torch.testing.assert_close(*found)


def scaled(size, calls):
    def running(u, c, t):
        calls.append(t)
        return size * square(u)

    return running


class Scaled:
    """The same as a class; its objects are made for a batch."""

    def __init__(self, size, calls):
        self.size, self.calls = size, calls

    def __call__(self, u, c, t):
        self.calls.append(t)
        return self.size * square(u)


def unsized(calls, size, u, c, t):
    calls.append(t)
    return size * square(u)


@pytest.mark.parametrize(
    "make",
    [scaled, Scaled, lambda size, calls: partial(unsized, calls, size)],
    ids=["function", "class", "partial"],
)
def test_a_running_cost_that_is_made_for_each_batch_is_looked_at_once(make):
    dynamics = bl.Map(lambda u, c, t: torch.tanh(c * u))
    counts = []
    for size in (1.0, 2.0, 3.0):
        calls = []
        problem = bl.ControlProblem(dynamics, lambda u, c: square(u), 5, make(size, calls))
        bl.adjoint(problem, real(1, 4), real(2, 1)[0], checkpointing=bl.Checkpointing())
        counts.append(len(calls))
    assert counts[0] - 2 == counts[1] == counts[2]
    drawn = own_draw(3)
    problem = bl.ControlProblem(
        dynamics, lambda u, c: square(u), 5, lambda u, c, t: (drawn(u) * u).sum()
    )
    with pytest.raises(ArgumentError, match="running cost"):
        bl.adjoint(problem, real(1, 4), real(2, 1)[0], checkpointing=bl.Checkpointing())
