"""Minibatches: the same whenever a step is asked for, another order each epoch."""

import pytest
import torch
from problems import real, square
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import bilevel as bl
from bilevel.errors import ArgumentError, StructureError

N, D = 23, 3
X, Y = real(1, N, D), real(2, N)


class Pairs(Dataset):
    """Samples as a dict; each draws as it is read, if asked to."""

    def __init__(self, noise=0.0):
        self.noise = noise

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"x": X[i] + self.noise * torch.randn(D, dtype=X.dtype), "y": Y[i], "i": i}


def rows(batch):
    """Which samples a batch of X holds."""
    return [int((x == X).all(1).nonzero()) for x in batch]


def test_what_a_sample_draws_is_of_the_seed_and_the_step_and_the_generator_stays_as_it_was():
    def noise(batches, t):
        batch = batches.at(t)
        return batch["x"] - X[batch["i"]]

    one, other = (bl.Minibatches(Pairs(0.5), 4, seed=seed) for seed in (3, 4))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = noise(one, 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(noise(one, 2), first)
    assert not torch.equal(noise(one, 3), first)
    assert not torch.equal(noise(other, 2), first)


@pytest.mark.parametrize("size", [1, 4, 23])
def test_an_epoch_holds_every_sample_once_and_the_next_in_another_order(size):
    batches = bl.Minibatches((X, Y), size, seed=3)
    n = len(batches)
    assert n == -(-N // size)
    epochs = [
        [i for t in range(e * n + 1, (e + 1) * n + 1) for i in rows(batches.at(t)[0])]
        for e in range(3)
    ]
    assert all(sorted(epoch) == [*range(N)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [i for x, _ in batches for i in rows(x)] == epochs[0]
    assert [len(x) for x, _ in batches][:-1] == [size] * (n - 1)
    for x, y in batches:
        assert torch.equal(Y[rows(x)], y)


def test_it_is_a_function_of_seed_and_step_and_leaves_the_generators_alone():
    first, again, other = (bl.Minibatches(X, 4, seed) for seed in (0, 0, 1))
    before = torch.get_rng_state()
    for t in (9, 2, 30, 2):
        assert torch.equal(first.at(t), again.at(t))
    assert not torch.equal(first.at(1), other.at(1))
    noisy = bl.Minibatches(Pairs(0.1), 4)
    assert torch.equal(noisy.at(5)["x"], noisy.at(5)["x"])
    assert not torch.equal(noisy.at(5)["x"] - X[noisy.at(5)["i"]], 0 * noisy.at(5)["x"])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_last_batch_may_be_left_out_and_all_samples_taken_at_once():
    batches = bl.Minibatches(X, 4, drop_last=True)
    assert len(batches) == 5
    assert all(len(batches.at(t)) == 4 for t in range(1, 20))
    assert torch.equal(batches.whole, X)
    assert torch.equal(bl.Minibatches(Pairs(), 4).whole["y"], Y)


@pytest.mark.parametrize(
    "dataset",
    [X, (X, Y), {"x": X, "y": (Y, Y)}, TensorDataset(X, Y), Pairs()],
    ids=lambda d: str(type(d).__name__),
)
def test_trees_of_tensors_and_datasets_of_any_kind_are_taken(dataset):
    batch = bl.Minibatches(dataset, 5).at(1)
    x = (
        batch
        if isinstance(batch, torch.Tensor)
        else batch["x"]
        if isinstance(batch, dict)
        else batch[0]
    )
    assert x.shape == (5, D)
    assert len(set(rows(x))) == 5


def test_a_collate_of_ones_own_is_used():
    batches = bl.Minibatches(Pairs(), 5, collate=lambda samples: [one["i"] for one in samples])
    assert sorted(i for t in range(1, 6) for i in batches.at(t)) == [*range(N)]


def problem():
    return bl.BilevelProblem(
        lambda w, a, b: square(b[0] @ w - b[1]) / len(b[1]) + a.exp() * square(w),
        lambda w, a, b: square(X @ w - Y) / N,
    )


@pytest.mark.parametrize(
    "method",
    [bl.MLM(), bl.MLM(bl.Checkpointing(snapshots=2)), bl.Unrolled()],
    ids=str,
)
def test_sweeps_find_the_batches_again(method):
    """The hypergradient is that of the loop written out."""
    batches = bl.Minibatches((X, Y), 6, seed=4)
    control = torch.tensor(-1.0, dtype=X.dtype)
    solver = bl.BilevelSolver(problem(), bl.optim.SGD(0.05), 17, method, certificate=None)
    found = solver.hypergradient(torch.zeros(D, dtype=X.dtype), control, batches)
    a = control.clone().requires_grad_()
    w = torch.zeros(D, dtype=X.dtype, requires_grad=True)
    for t in range(1, 18):
        loss = problem().inner(w, a, batches.at(t))
        w = w - 0.05 * torch.autograd.grad(loss, w, create_graph=True)[0]
    value = problem().outer(w, a, None)
    torch.testing.assert_close(found.value, value.detach(), rtol=1e-13, atol=0)
    expected = torch.autograd.grad(value, a)[0]
    torch.testing.assert_close(found.gradient, expected, rtol=1e-12, atol=0)


def test_they_are_judged_by_a_batch_of_ones_own_and_by_nothing_else():
    batches, start = bl.Minibatches((X, Y), 6), torch.zeros(D, dtype=X.dtype)
    solver = bl.BilevelSolver(problem(), bl.optim.SGD(0.05), 30, on_failure="ignore")
    control = torch.tensor(-1.0, dtype=X.dtype)
    assert "linear_batch" in solver.hypergradient(start, control, batches).certificate.reason
    whole = solver.hypergradient(start, control, batches, linear_batch=batches.whole)
    assert "linear_batch" not in whole.certificate.reason


def test_an_outer_loop_gets_epoch_after_epoch():
    seen = []

    def outer(w, a, b):
        seen.append(tuple(rows(b[0])))
        return square(b[0] @ w - b[1])

    solver = bl.BilevelSolver(
        bl.BilevelProblem(problem().inner, outer), bl.optim.SGD(0.05), 3, certificate=None
    )
    inner, judged = bl.Minibatches((X, Y), N), bl.Minibatches((X, Y), 8, seed=2)
    start, control = torch.zeros(D, dtype=X.dtype), torch.tensor(-1.0, dtype=X.dtype)
    solver.solve(start, control, steps=7, batches=(inner, judged))
    assert seen[:7] == [tuple(rows(judged.at(t)[0])) for t in range(1, 8)]
    costs = []
    build = lambda b: (  # noqa: E731
        bl.ControlProblem(
            bl.Map(lambda u, c, t: u + c),
            lambda u, c: (costs.append(len(b)), square(u - b.mean(0)))[1],
            2,
        ),
        torch.zeros(D, dtype=X.dtype),
    )
    bl.ControlSolver(build).solve(
        torch.zeros(D, dtype=X.dtype), steps=5, batches=bl.Minibatches(X, 8)
    )
    assert costs[:4] == [8, 8, 7, 8]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


LOADER = DataLoader(TensorDataset(X, Y), batch_size=4)
BAD = {
    "loader": (lambda: bl.Minibatches(LOADER, 4), "dataset is a DataLoader, which shuffles anew"),
    "stream": (lambda: bl.Minibatches(Stream(), 4), "map-style Dataset, with __getitem__"),
    "list": (lambda: bl.Minibatches([X, Y], 4), "a list may hold tensors or samples"),
    "numbers": (lambda: bl.Minibatches((X, 3), 4), "must hold tensors with a first axis"),
    "arrays": (lambda: bl.Minibatches((X.numpy(), Y), 4), "torch.as_tensor makes tensors of"),
    "scalar": (lambda: bl.Minibatches(torch.tensor(1.0), 1), "must hold tensors with a first axis"),
    "empty": (lambda: bl.Minibatches(X[:0], 1), "no samples"),
    "size": (lambda: bl.Minibatches(X, N + 1), "at most the number of samples, 23, got 24"),
    "zero": (lambda: bl.Minibatches(X, 0), "size must be"),
    "collate": (lambda: bl.Minibatches(X, 2, collate=list), "tensors are indexed"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_asked_again_is_refused(name):
    make, message = BAD[name]
    with pytest.raises(ArgumentError, match=message):
        make()


def test_tensors_of_unlike_length_are_refused():
    with pytest.raises(StructureError, match="same number of samples, got 22 and 23"):
        bl.Minibatches((X, Y[:-1]), 2)


@pytest.mark.parametrize("name", ["inner_batch", "linear_batch"])
def test_a_loader_as_a_batch_is_refused_with_what_to_pass(name):
    solver = bl.BilevelSolver(problem(), bl.optim.SGD(0.05), 3, certificate=None)
    given = torch.zeros(D, dtype=X.dtype), torch.tensor(-1.0, dtype=X.dtype)
    with pytest.raises(ArgumentError, match=f"{name} is a DataLoader.*Minibatches"):
        solver.hypergradient(*given, **{name: LOADER})


@pytest.mark.parametrize("many", [LOADER, bl.Minibatches((X, Y), 4)], ids=["loader", "minibatches"])
def test_many_batches_in_the_place_of_the_outer_one_are_refused(many):
    solver = bl.BilevelSolver(problem(), bl.optim.SGD(0.05), 3, certificate=None)
    given = torch.zeros(D, dtype=X.dtype), torch.tensor(-1.0, dtype=X.dtype)
    with pytest.raises(ArgumentError, match=f"outer_batch is one batch.*got {type(many).__name__}"):
        solver.hypergradient(*given, outer_batch=many)
