"""Solvers, storages and the network on another device, and beside another default device."""

from dataclasses import fields, is_dataclass, replace

import pytest
import torch
import training_cases
from elsewhere import OtherDevice, away, back
from problems import F64, real

import bilevel as bl
from applications.mri.network.architecture import light, tiny
from applications.mri.network.reconstruction import Loss, Network
from applications.mri.physics.operators import ifft2c
from applications.mri.training.examples import PreparedExample
from bilevel import tree

PARAMS = {"W": 0.3 * real(1, 3, 4), "v": real(2, 4)}
CONTROL = {"decay": real(3, 4) - 1, "rate": torch.tensor(0.2, dtype=F64)}
DECAY = {"decay": CONTROL["decay"]}
TRAIN, JUDGED = (real(4, 12, 3), real(5, 12)), (real(6, 12, 3), real(7, 12))


def fit(w, c, batch):
    return ((torch.tanh(batch[0] @ w["W"]) @ w["v"] - batch[1]) ** 2).mean()


def decayed(w, c, batch):
    squares = (c["decay"].exp() * w["v"] ** 2).sum() + (w["W"] ** 2).sum()
    return fit(w, c, batch) / 2 + squares / 2


PROBLEM = bl.BilevelProblem(decayed, fit)
MOVING = bl.optim.SGD(lambda c: c["rate"], momentum=0.5)
PROXIMAL = bl.optim.ProximalGradient(0.2, bl.prox.L1(0.01))


def solver(method, rule, steps=5, certificate=None):
    return bl.BilevelSolver(PROBLEM, rule, steps, method, certificate, on_failure="ignore")


def hypergradient(method, rule=MOVING, control=CONTROL, **settings):
    def found(*given):
        return solver(method, rule, **settings).hypergradient(*given).gradient

    return found, (PARAMS, control, TRAIN, JUDGED)


def implicit(linear, rule=None, **settings):
    return hypergradient(bl.Implicit(linear), rule or bl.optim.SGD(0.2), DECAY, **settings)


def kept(storage):
    return hypergradient(bl.MLM(bl.Checkpointing(2, block=2, storage=storage)), steps=9)


def control_problem(x, y):
    def step(u, c, t):
        return torch.tanh(u @ c["W"]) + u

    return bl.ControlProblem(bl.Map(step), lambda u, c: ((u - y) ** 2).mean(), 3), x


def controlled(optimizer):
    def found(control, x, y):
        problem, start = control_problem(x, y)
        solver = bl.ControlSolver(problem, optimizer, on_failure="ignore")
        ended = solver.solve(control, start, steps=2)
        return ended.control, ended.kkt.stationarity

    return found, ({"W": 0.3 * real(1, 3, 3)}, real(2, 5, 3), real(3, 5, 3))


def solved():
    def found(params, control, train, judged):
        loaders = bl.Minibatches(train, 4), bl.Minibatches(judged, 4)
        ended = solver(bl.MLM(), MOVING).solve(params, control, steps=2, batches=loaders)
        return ended.control, ended.params

    return found, (PARAMS, CONTROL, TRAIN, JUDGED)


def weighted():
    weights = bl.TaskWeights(3, 2)

    def found(params, alpha, goals):
        problem = bl.weighted_problem(
            lambda w, b: ((w - b) ** 2).sum(-1), lambda w, b: ((w - b[:2]) ** 2).sum(-1), weights
        )
        at = bl.BilevelSolver(problem, bl.optim.SGD(0.1), 5, certificate=None)
        return at.hypergradient(params, alpha, goals, goals).gradient

    return found, (weights.stacked(real(1, 4)), real(2, 3, 2), real(3, 3, 4))


CASES = {
    "MLM": hypergradient(bl.MLM()),
    "MLM in a budget": hypergradient(bl.MLM(bl.Budget("1 MiB"))),
    "Unrolled, Adam": hypergradient(bl.Unrolled(), bl.optim.Adam(lambda c: c["rate"])),
    "OneStep": hypergradient(bl.OneStep()),
    "certified": implicit(bl.linear.CG(probes=4), steps=12, certificate=bl.AgainstMinimiser()),
    "Nystrom": implicit(bl.linear.Nystrom(8, 0.1)),
    "Dense": implicit(bl.linear.Dense()),
    "Neumann": implicit(bl.linear.Neumann(5, 0.2)),
    "GMRES": implicit(bl.linear.GMRES(), PROXIMAL, certificate=bl.AgainstMinimiser()),
    "NormalCG": implicit(bl.linear.NormalCG(), PROXIMAL),
    "InMemory": kept(bl.InMemory()),
    "OnHost": kept(bl.OnHost()),
    "OnDisk": None,  # which needs a folder
    "solve": solved(),
    "NewtonCG": controlled(bl.NewtonCG()),
    "Riccati": controlled(bl.Riccati()),
    "Riccati in a box": controlled(bl.Riccati(bounds=(-0.5, 0.5))),
    "LBFGS": controlled(lambda x: torch.optim.LBFGS(x, 0.5, max_iter=2)),
    "weights": weighted(),
}


def same(found, expected):
    for x, y in zip(tree.leaves_of(found), tree.leaves_of(expected), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("name", CASES)
def test_another_device_gives_the_same_and_the_default_device_does_not_matter(name, tmp_path):
    function, given = CASES[name] or kept(bl.OnDisk(tmp_path))
    expected = function(*given)
    with OtherDevice():
        found = function(*tree.map_leaves(away, given))
    assert {x.device.type for x in tree.leaves_of(found) if isinstance(x, torch.Tensor)} == {"meta"}
    same(tree.map_leaves(back, found), expected)
    with torch.device("meta"):  # of what is made without a device, which then has no numbers
        beside = function(*given)
    same(beside, expected)


def moved(record):
    """A record whose tensors, and those of records in it, are on the other device."""
    if not is_dataclass(record):
        return away(record)
    values = {f.name: moved(getattr(record, f.name)) for f in fields(record)}
    return replace(record, **values)


NETWORKS = {
    "paper": (training_cases.network(), bl.InMemory),
    "paper, OnHost": (training_cases.network(), bl.OnHost),
    "light": (Network(replace(light(), n_phases=2), seed=1), bl.InMemory),
    "tiny": (Network(tiny(training_cases.COILS), seed=1), bl.InMemory),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_trained_on_another_device(name):
    network, storage = NETWORKS[name]
    one, size = training_cases.simulated(1)[0], (training_cases.SIZE, training_cases.SIZE)
    scan = network.prepare(
        one.kspace[None], training_cases.SAMPLING.mask(size, training_cases.seeded())
    )
    example = PreparedExample(scan, ifft2c(one.kspace)[None], one.reference[None])

    def gradient(example, control):
        problem, start = example.problem(network, Loss())
        at = bl.Checkpointing(1, block=1, storage=storage())
        return bl.adjoint(problem, start, control, checkpointing=at).gradient

    expected = gradient(example, network.controls())
    with OtherDevice():
        found = gradient(moved(example), tree.map_leaves(away, network.controls()))
    same(tree.map_leaves(back, found), expected)


def test_a_tensor_of_the_cpu_is_refused_there():
    with OtherDevice(), pytest.raises(RuntimeError, match="tensors of two devices"):
        away(real(1, 3)) + torch.ones(3)
