"""Several tasks an update: in turn, or side by side in one inner iteration."""

import math
from dataclasses import replace

import pytest
import torch
from problems import cplx, real

import bilevel as bl
from bilevel import errors, tree

F64 = torch.float64
TASKS = [
    ((real(i, 9, 3), real(10 + i, 9)), (real(20 + i, 5, 3), real(30 + i, 5))) for i in range(6)
]


def loss(w, data):
    X, y = data
    return ((X @ w - y) ** 2).mean() / 2


MAML = bl.BilevelProblem(
    lambda w, c, batch: loss(w, batch),
    lambda w, c, batch: loss(w, batch),
    start=lambda w, c: c,
)
RIDGE = bl.BilevelProblem(
    lambda w, c, batch: loss(w, batch) + (c.exp() * w**2).sum() / 2,
    lambda w, c, batch: loss(w, batch),
)
ZERO = torch.zeros(3, dtype=F64)
WAYS = [bl.Looped(), bl.Vmapped()]


def sgd(lr):
    return lambda leaves: torch.optim.SGD(leaves, lr)


def solved(problem, way, n=3, steps=4, method=None, rule=None, **settings):
    method, rule = method or bl.MLM(), rule or bl.optim.SGD(0.2)
    solver = bl.BilevelSolver(problem, rule, 5, method, certificate=None)
    control = settings.pop("control", real(50, 3))
    params = settings.pop("params", ZERO)
    batches = settings.pop("batches", TASKS)
    return solver.solve(
        params,
        control,
        sgd(0.3),
        steps=steps,
        batches=batches,
        accumulate=n,
        evaluate=way,
        **settings,
    )


@pytest.mark.parametrize("way", WAYS, ids=repr)
@pytest.mark.parametrize("problem", [MAML, RIDGE], ids=["start", "weights"])
def test_an_update_goes_by_the_mean_of_its_tasks(problem, way):
    control = real(50, 3)
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.2), 5, certificate=None)
    values = []
    for k in range(4):
        group = [TASKS[(3 * k + j) % 6] for j in range(3)]
        each = [solver.hypergradient(ZERO, control, *pair) for pair in group]
        values.append(float(sum(h.value for h in each) / 3))
        control = control - 0.3 * sum(h.gradient for h in each) / 3
    found = solved(problem, way)
    torch.testing.assert_close(found.control, control, rtol=1e-11, atol=1e-13)
    assert found.values == pytest.approx(values, rel=1e-11)


@pytest.mark.parametrize(
    ("rule", "method"),
    [
        (bl.optim.Adam(0.05), bl.MLM()),
        (bl.optim.SGD(0.1, 0.9), bl.Unrolled()),
        (bl.optim.SGD(0.4), bl.Implicit()),
        (bl.optim.SGD(0.4), bl.Penalty()),
        (bl.optim.ProximalGradient(0.2, bl.prox.L1(0.01)), bl.MLM()),
        (bl.optim.ProximalGradient(0.2, bl.prox.Simplex()), bl.MLM()),
        (bl.optim.Clipped(bl.optim.SGD(0.2), clip_value=0.1), bl.MLM()),
    ],
    ids=lambda x: type(x).__name__,
)
def test_side_by_side_is_as_in_turn(rule, method):
    ends = [solved(RIDGE, way, rule=rule, method=method).control for way in WAYS]
    exact = isinstance(method, bl.MLM | bl.Unrolled)
    torch.testing.assert_close(*ends, rtol=1e-10 if exact else 1e-3, atol=1e-12)


@pytest.mark.parametrize("way", WAYS, ids=repr)
def test_tasks_may_have_trees_complex_numbers_and_labels(way):
    batches = [
        ({"z": cplx(i, 2), "label": torch.tensor(i % 2), "n": 2}, cplx(10 + i, 2)) for i in range(4)
    ]
    problem = bl.BilevelProblem(
        lambda p, c, b: (
            ((p["z"] - c["a"] * b["z"]).abs() ** 2).sum() * b["n"] / 2
            + (p["x"] - b["label"] * c["b"]) ** 2
        ),
        lambda p, c, b: ((p["z"] - b).abs() ** 2).sum() + p["x"] ** 2 * p["k"],
    )
    params = {
        "z": torch.zeros(2, dtype=torch.complex128),
        "x": torch.tensor(1.0, dtype=F64),
        "k": 2,
    }
    control = {"a": cplx(40, 2), "b": torch.tensor(0.3, dtype=F64)}
    found = solved(problem, way, 2, params=params, control=control, batches=batches)
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.2), 5, certificate=None)
    for k in range(4):
        each = [
            solver.hypergradient(params, control, *batches[(2 * k + j) % 4]).gradient
            for j in range(2)
        ]
        control = tree.map_leaves(lambda x, g, h: x - 0.3 * (g + h) / 2, control, *each)
    torch.testing.assert_close(found.control, control, rtol=1e-11, atol=1e-13)


def two_heads(batch_reads):
    """Each task has a head of its own in the control, and all share the body."""
    return bl.BilevelProblem(
        lambda w, c, batch: ((w - c["body"]) ** 2).sum() / 2,
        lambda w, c, batch: ((w + c[batch]) ** 2).sum() if batch else (w**2).sum(),
    )


def test_a_head_that_one_task_does_not_read_has_gradient_zero_there():
    problem = two_heads(None)
    control = {"body": real(1, 2), "left": real(2, 2), "right": real(3, 2)}
    each = [(None, "left"), (None, "right"), (None, "")]
    seen = []
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 60, certificate=None)
    solver.solve(
        torch.zeros(2, dtype=F64),
        control,
        sgd(0.1),
        steps=1,
        batches=each,
        accumulate=3,
        callback=lambda p: seen.append(p.found.gradient),
    )
    for name in ("left", "right"):
        expected = 2 * (control["body"] + control[name]) / 3
        torch.testing.assert_close(seen[0][name], expected, rtol=1e-9, atol=1e-12)


def test_a_head_that_no_task_of_the_first_update_reads_is_refused():
    control = {"body": real(1, 2), "left": real(2, 2), "right": real(3, 2)}
    solver = bl.BilevelSolver(two_heads(None), bl.optim.SGD(0.5), 20, certificate=None)
    with pytest.raises(errors.LostGradientError, match=r"control\['right'\] reaches no objective"):
        solver.solve(
            torch.zeros(2, dtype=F64),
            control,
            sgd(0.1),
            steps=1,
            batches=[(None, "left"), (None, "")],
            accumulate=2,
        )


def test_an_update_is_judged_by_the_worst_of_its_tasks():
    solver = bl.BilevelSolver(RIDGE, bl.optim.SGD(0.2), 8, on_failure="ignore")
    pairs = [TASKS[0], TASKS[1]]
    each = [solver.hypergradient(ZERO, real(50, 3), *pair).certificate for pair in pairs]
    found = solver.solve(ZERO, real(50, 3), sgd(0.1), steps=1, batches=pairs, accumulate=2)
    (certificate,) = found.certificates
    assert certificate.error_estimate == max(c.error_estimate for c in each)
    assert certificate.error == pytest.approx(sum(c.error for c in each) / 2)
    assert certificate.trustworthy == all(c.trustworthy for c in each)
    together = solver.solve(
        ZERO, real(50, 3), sgd(0.1), steps=1, batches=pairs, accumulate=2, evaluate=bl.Vmapped()
    )
    assert math.isfinite(together.certificates[0].error_estimate)
    assert together.params.shape == (2, 3)


def test_batches_of_the_steps_are_stacked_step_by_step():
    def of(i):
        data = real(i, 12, 3), real(10 + i, 12)
        return bl.Minibatches(data, 4, seed=i), data

    batches = [of(i) for i in range(4)]
    ends = [solved(RIDGE, way, 2, batches=batches).control for way in WAYS]
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-13)


def test_a_warm_start_goes_on_where_it_is_asked_for():
    ends = [solved(RIDGE, way, warm_start=True, batches=TASKS[:3]).control for way in WAYS]
    cold = solved(RIDGE, None, batches=TASKS[:3]).control
    assert all(float((end - cold).norm()) > 1e-6 for end in ends)
    assert torch.equal(
        cold, solved(RIDGE, bl.Looped(), batches=TASKS[:3], warm_start=False).control
    )


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"n": 0}, errors.ArgumentError, "accumulate must be a whole number >= 1"),
        ({"n": 2, "batches": None}, errors.ArgumentError, "accumulate=2 needs batches"),
        ({"way": "vmap"}, errors.ArgumentError, r"evaluate must be Vmapped\(\) or Looped\(\)"),
        (
            {
                "way": bl.Vmapped(),
                "batches": [TASKS[0], (TASKS[1][0], (real(1, 4, 3), real(2, 4)))],
            },
            errors.StructureError,
            "batches of one shape",
        ),
        (
            {"way": bl.Vmapped(), "problem": replace(RIDGE, columns=3)},
            errors.ArgumentError,
            "has columns already",
        ),
        (
            {"way": bl.Vmapped(), "rule": bl.optim.Clipped(bl.optim.SGD(0.1), max_norm=1.0)},
            errors.UnsupportedError,
            "couple the entries",
        ),
        (
            {"way": bl.Vmapped(), "rule": bl.optim.ProximalGradient(0.1, bl.prox.Ball())},
            errors.UnsupportedError,
            "couple the entries",
        ),
    ],
)
def test_bad_input_is_refused(settings, kind, message):
    given = {"problem": RIDGE, "way": None, **settings}
    with pytest.raises(kind, match=message):
        solved(**given)


@pytest.mark.parametrize("way", WAYS, ids=repr)
def test_a_kept_run_goes_on_with_the_next_tasks(way, tmp_path):
    keep = bl.Keep(tmp_path, every=1)
    batches = TASKS[:5]  # not a whole number of updates a round
    solved(RIDGE, way, 2, 3, batches=batches, keep=keep, warm_start=True)
    again = solved(RIDGE, way, 2, 6, batches=batches, keep=keep, warm_start=True, resume=True)
    whole = solved(RIDGE, way, 2, 6, batches=batches, warm_start=True)
    assert torch.equal(again.control, whole.control)
    assert again.values == whole.values
