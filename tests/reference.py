"""The truth to compare with: the plain loop, and plain autograd through it."""

import torch

import bilevel as bl
from bilevel import tree


def theta(control, t):
    """What step t receives, written out once more."""
    if not isinstance(control, bl.PerStep):
        return control
    own = control.steps[t - 1]
    return own if control.shared is None else (own, control.shared)


def initial(control):
    return control.initial if isinstance(control, bl.PerStep) else control


def running_cost(problem, state, control, t):
    if problem.running is None:
        return torch.zeros((), dtype=torch.float64)
    return problem.running(problem.dynamics.readout(state), theta(control, t), t)


def terminal_cost(problem, state, control):
    return problem.terminal(problem.dynamics.readout(state), control)


def cost_to_go(problem, state, control, t):
    """J from u(t) on: running costs of the steps after t, and the terminal cost."""
    total = torch.zeros((), dtype=torch.float64)
    for s in range(t + 1, problem.horizon + 1):
        total = total + running_cost(problem, state, control, s)
        state = problem.dynamics.step(state, theta(control, s), s)
    return terminal_cost(problem, state, control) + total


def plain_states(dynamics, observation, control, horizon):
    states = [dynamics.init(observation, initial(control))]
    for t in range(1, horizon + 1):
        states.append(dynamics.step(states[-1], theta(control, t), t))
    return states


def plain_cost(problem, observation, control):
    start = problem.dynamics.init(observation, initial(control))
    return cost_to_go(problem, start, control, 0)


def fresh(values):
    """A copy whose variables require grad."""
    return tree.map_leaves(
        lambda x: x.detach().clone().requires_grad_() if tree.is_variable(x) else x, values
    )


def wanted(values):
    return [x for x in tree.leaves_of(values) if tree.is_variable(x)]


def autograd(value, *inputs):
    """Gradients by one call of torch.autograd.grad; zeros where nothing depends on a leaf."""
    leaves = [x for values in inputs for x in wanted(values)]
    if not (value.requires_grad and leaves):
        found = [None] * len(leaves)
    else:
        found = torch.autograd.grad(value, leaves, allow_unused=True)
    filled = iter(
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)
    )
    return tuple(
        tree.map_leaves(lambda x: next(filled) if tree.is_variable(x) else None, values)
        for values in inputs
    )


def plain_gradients(problem, observation, control):
    """J and its gradients in the control and the observation."""
    observation, control = fresh(observation), fresh(control)
    value = plain_cost(problem, observation, control)
    return value.detach(), *autograd(value, control, observation)


def plain_multipliers(problem, states, control):
    """lambda_t = -dJ/du(t) by one independent autograd call for each t."""
    found = []
    for t, state in enumerate(states):
        state = fresh(state)
        (gradient,) = autograd(cost_to_go(problem, state, tree.detach(control), t), state)
        found.append(tree.negative(gradient))
    return found


def assert_same(found, truth, rtol=1e-12):
    """Leaf by leaf; `rtol` is relative to the largest entry, and 0 asks for equal bits."""
    leaves, structure = tree.flatten(found)
    truths, expected = tree.flatten(truth)
    assert structure == expected
    for new, old in zip(leaves, truths, strict=True):
        if not tree.is_variable(old):
            assert torch.equal(new, old) if isinstance(old, torch.Tensor) else new == old
            continue
        assert new is not None
        largest = float(old.abs().max()) if old.numel() else 0.0
        torch.testing.assert_close(new, old, rtol=0, atol=rtol * largest)


def assert_same_vector(found, truth, rtol=1e-12):
    """As a whole; for vectors with parts that are zero but for rounding."""
    largest = max([float(x.abs().max()) for x in wanted(truth) if x.numel()], default=0.0)
    for new, old in zip(wanted(found), wanted(truth), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=rtol * largest)


def random_like(values, generator, scale=1.0):
    """A random vector in the space of `values`."""
    return tree.map_leaves(
        lambda x: (
            scale * torch.randn(x.shape, dtype=x.dtype, generator=generator)
            if tree.is_variable(x)
            else None
        ),
        values,
    )


def moved(values, direction, step):
    """`values + step * direction`, detached."""
    return tree.map_leaves(
        lambda x, d: (
            x.detach() + step * d
            if tree.is_variable(x)
            else (x.detach() if isinstance(x, torch.Tensor) else x)
        ),
        values,
        direction,
    )


def random_point(problem, observation, control, seed):
    """States and multipliers that satisfy nothing; integer leaves as the dynamics has them."""
    generator = torch.Generator().manual_seed(seed)
    swept = plain_states(problem.dynamics, observation, control, problem.horizon)
    states = [moved(u, random_like(u, generator), 0.3) for u in swept]
    multipliers = [random_like(u, generator) for u in swept]
    return states, multipliers
