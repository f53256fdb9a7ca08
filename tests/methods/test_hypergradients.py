"""Hypergradients of every method against closed forms, against each other and a bare loop."""

import pytest
from bilevel_cases import CASES, unrolled

import bilevel as bl

EXACT_AT_THE_LIMIT = [bl.Unrolled(), bl.MLM(), bl.Implicit()]
EXACT_FOR_THE_STEPS = [
    bl.Unrolled(),
    bl.MLM(),
    bl.MLM(bl.Checkpointing(block=None)),
    bl.MLM(bl.Checkpointing(snapshots=2, block=3)),
    bl.MLM(last=1000),
]


def name(value):
    return repr(value) if isinstance(value, bl.methods.HypergradientMethod) else None


def solver(case, method, steps=None, optimizer=None, certificate=None, **settings):
    optimizer = optimizer or bl.optim.SGD(case.step_size)
    steps = case.steps if steps is None else steps
    return bl.BilevelSolver(
        case.problem, optimizer, steps, method, certificate=certificate, **settings
    )


def difference(found, expected):
    """Relative, in the norm of the whole tree; the structures must be equal."""
    pairs = list(zip(bl.tree.leaves_of(found), bl.tree.leaves_of(expected), strict=True))
    assert all((a is None) == (b is None) for a, b in pairs)
    apart = bl.tree.norm([a - b for a, b in pairs if a is not None])
    return apart / bl.tree.norm(expected)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("method", EXACT_AT_THE_LIMIT, ids=name)
def test_the_hypergradient_is_exact_once_the_inner_iteration_has_converged(case, method):
    found = solver(case, method).hypergradient(case.params, case.control)
    assert difference(found.gradient, case.exact) <= 1e-8
    assert bl.tree.norm(bl.tree.subtract(found.params, case.minimiser)) <= 1e-8


# What is kept of the trajectory does not see what is in the params: the last cases have it all.
@pytest.mark.parametrize(
    ("case", "method"),
    [
        (case, method)
        for case in CASES
        for method in (EXACT_FOR_THE_STEPS if case in CASES[-4:] else EXACT_FOR_THE_STEPS[:2])
    ],
    ids=repr,
)
def test_sweeps_and_unrolling_agree_with_a_bare_loop_to_twelve_digits(case, method):
    for steps in (1, 2, 7):
        found = solver(case, method, steps).hypergradient(case.params, case.control)
        assert difference(found.gradient, unrolled(case, steps)) <= 1e-12
