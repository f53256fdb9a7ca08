"""What is compared when a block is evaluated again."""

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
