import signal
from dataclasses import dataclass, replace

import pytest
import torch
from training_cases import (
    BASE,
    COILS,
    SAMPLING,
    SIZE,
    network,
    same,
    seeded,
    simulated,
    trained,
    write_scans,
)

import bilevel as bl
from applications.errors import InputError
from applications.mri.data import SliceDataset, Volume, write_volume
from applications.mri.network.architecture import narrow, paper
from applications.mri.network.reconstruction import Loss, Network
from applications.mri.network.weights import load_weights
from applications.mri.physics.coil_counts import coil_matrix
from applications.mri.physics.operators import fft2c, ifft2c, rss
from applications.mri.sampling import CartesianRandom, PoissonDisc, Sampling
from applications.mri.training.examples import draw_full
from applications.mri.training.keeping import Keeper
from applications.mri.training.schedules import Constant, Cosine, Step
from applications.mri.training.settings import TrainingSettings
from applications.mri.training.training import train
from applications.records import describe
from bilevel import tree


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans"))


@pytest.fixture(scope="module")
def usual(scans):
    return trained(scans, BASE)


def test_training_is_deterministic_by_its_seed(scans, usual):
    first, again = usual, trained(scans, BASE)
    assert first.costs == again.costs
    assert same(first, again)
    assert len(first.costs) == 4


def test_training_does_not_change_the_weights_it_begins_with(scans):
    net = network()
    control = net.controls()
    before = tree.map_leaves(lambda x: x if x is None else x.clone(), control)
    train(net, control, scans, BASE)
    for new, old in zip(tree.leaves_of(control), tree.leaves_of(before), strict=True):
        assert new is old is None or torch.equal(new, old)


CHANGES = {
    "schedule": {"schedule": Constant()},
    "accumulate": {"accumulate": 2},
    "samplings": {"samplings": (CartesianRandom(3, 0.25),)},
    "steps": {"steps": 3},
    "learning_rate": {"learning_rate": 1e-3},
    "warmup": {"warmup": 0},
    "crop": {"crop": 8},
    "loss": {"loss": Loss(combined=0.1)},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_setting_matters(scans, usual, change):
    assert not same(usual, trained(scans, replace(BASE, **change)))


def test_the_share_of_whole_slices_matters(scans):
    cropped = replace(BASE, crop=8, whole=0.0)
    assert not same(trained(scans, cropped), trained(scans, replace(cropped, whole=0.9)))


def test_a_training_by_seconds_ends_in_time(scans, usual):  # the first training loads more
    found = trained(scans, replace(BASE, steps=None, seconds=0.3))
    assert 0.3 <= found.seconds < 5
    assert len(found.costs) > 1
    shares = []
    trained(
        scans,
        replace(BASE, steps=None, seconds=0.3),
        after_step=lambda state: shares.append(state.share),
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_the_limit_that_is_reached_first_counts(scans):
    assert len(trained(scans, replace(BASE, steps=2, seconds=1000.0)).costs) == 2
    assert trained(scans, replace(BASE, steps=10**6, seconds=0.1)).seconds < 5


@dataclass(frozen=True, eq=False)
class Counting(Network):
    """Counts the phases evaluated."""

    def dynamics(self, scan):
        made = super().dynamics(scan)
        calls = COUNT

        @dataclass(frozen=True)
        class Counted(bl.Phases):
            def step(self, state, control, t):
                calls.append(t)
                return super().step(state, control, t)

        return Counted(made.modules, made.initial, made.context)


COUNT = []


@pytest.mark.parametrize(
    ("checkpointing", "evaluated"),
    [  # the first replay of all compares the gradients of two evaluations more
        (bl.Checkpointing(), [1, 2, 1, 1, 1, 1, 2, 1]),
        (bl.Checkpointing(block=None), [1, 2] * 2),
    ],
    ids=repr,
)
def test_the_checkpointing_is_that_of_the_sweeps(scans, checkpointing, evaluated):
    COUNT.clear()
    settings = replace(BASE, steps=2, checkpointing=checkpointing)
    trained(scans, settings, network(kind=Counting))
    assert evaluated == COUNT


def test_a_budget_keeps_what_fits_and_is_planned_once_for_each_slice_shape(scans):
    crops = replace(BASE, steps=6, crop=8, whole=0.5)  # three updates of each shape
    truth = trained(scans, crops, network(kind=Counting))
    COUNT.clear()
    trained(
        scans, replace(crops, checkpointing=bl.Checkpointing(block=None)), network(kind=Counting)
    )
    assert len(COUNT) == 6 * 2
    COUNT.clear()
    settings = replace(crops, checkpointing=bl.Budget("1 GB"))  # room for every graph
    found = trained(scans, settings, network(kind=Counting))
    # Rehearsed once for crops and once for slices: each phase four times, after the first one.
    assert len(COUNT) == 6 * 2 + 2 * (1 + 8)
    assert same(found, truth)
    with pytest.raises(
        bl.errors.ArgumentError, match=r"a budget of 1024 bytes is too small: .* at least"
    ):
        trained(scans, replace(BASE, checkpointing=bl.Budget("1 KiB")))


def test_accumulated_slices_move_by_what_a_batch_of_them_does(scans):
    """Loss and gradient of two slices with masks of their own, one by one and as one batch."""
    net, seen = network(), []
    settings = replace(BASE, steps=1, accumulate=2, warmup=0)

    @dataclass(frozen=True, eq=False)
    class Noting(Network):
        def training_problem(self, scan, target, reference, loss):
            seen.append((scan.kspace * scan.scale, scan.mask[:, 0], target, reference))
            return super().training_problem(scan, target, reference, loss)

    found = trained(scans, settings, Noting(net.architecture, seed=1))
    assert len(seen) == 2
    kspace, masks, target, reference = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert not torch.equal(masks[0], masks[1])
    scan = net.prepare(kspace, masks)
    batch = net.training_problem(scan, target, reference, Loss())
    truth = bl.adjoint(*batch, net.controls())
    assert found.costs == pytest.approx([float(truth.cost)], rel=1e-5)
    # Adam's first step is rate * sign(gradient) nearly, of which rounding can flip small ones.
    first = lambda leaves: torch.optim.Adam(leaves, settings.learning_rate, betas=(0.9, 0.99))  # noqa: E731
    moved = bl.ControlSolver(lambda b: b, first).solve(net.controls(), steps=1, batches=[batch])
    leaves = zip(
        tree.leaves_of(found.control),
        tree.leaves_of(moved.control),
        tree.leaves_of(truth.gradient),
        strict=True,
    )
    for new, old, gradient in leaves:
        if new is not None:
            sure = gradient.abs() > 1e-3 * gradient.abs().max()
            torch.testing.assert_close(new[sure], old[sure], rtol=1e-4, atol=1e-5)


RATES = {
    "cosine": (Cosine(), lambda s: (1 + torch.cos(torch.pi * s)) / 2),
    "constant": (Constant(), torch.ones_like),
    "step": (Step((0.5, 0.75), 0.1), lambda s: 0.1 ** ((s >= 0.5) * 1.0 + (s >= 0.75) * 1.0)),
}


@pytest.mark.parametrize(("schedule", "factor"), RATES.values(), ids=RATES)
def test_the_learning_rate_rises_and_falls_by_its_schedule(scans, schedule, factor):
    """The rates are read where Adam takes its steps."""
    rates = []

    class Probe(torch.optim.Adam):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("applications.mri.training.training.torch.optim.Adam", Probe)
        settings = replace(BASE, steps=8, warmup=4, learning_rate=0.01, schedule=schedule)
        states = []
        trained(scans, settings, after_step=states.append)
    shares = torch.arange(8) / 8
    rise = ((torch.arange(8) + 1) / 4).clamp(max=1)
    torch.testing.assert_close(torch.tensor(rates), 0.01 * rise * factor(shares))
    assert [state.rate for state in states] == rates


def mean_cost(net, scans, control):
    """Of all slices, each with its own mask."""
    costs = []
    for k in range(len(scans)):
        one = scans[k]
        mask = SAMPLING.mask((SIZE, SIZE), seeded(k))
        scan = net.prepare(one.kspace[None], mask)
        problem, start = net.training_problem(
            scan, ifft2c(one.kspace)[None], one.reference[None], Loss()
        )
        costs.append(float(bl.adjoint(problem, start, control).cost))
    return sum(costs) / len(costs)


@pytest.mark.parametrize("preset", [paper, narrow])
def test_the_loss_falls_on_a_small_problem(scans, preset):
    net = network(preset)
    settings = TrainingSettings((SAMPLING,), steps=12, learning_rate=1e-2, warmup=2)
    found = trained(scans, settings, net)
    assert mean_cost(net, scans, found.control) < 0.9 * mean_cost(net, scans, net.controls())


@dataclass(frozen=True, eq=False)
class Watched(Network):
    """Notes what each update is trained on."""

    def training_problem(self, scan, target, reference, loss):
        SEEN.append((tuple(scan.kspace.shape[1:]), target.clone(), reference.clone(), scan))
        return super().training_problem(scan, target, reference, loss)


SEEN = []


@dataclass(frozen=True)
class Probe(Sampling):
    """Notes the matrix sizes that masks are drawn for."""

    inner: Sampling
    shapes: list

    def mask(self, shape, generator):
        self.shapes.append(tuple(shape))
        return self.inner.mask(shape, generator)


def watched(scans, settings):
    SEEN.clear()
    trained(scans, settings, network(kind=Watched))
    return list(SEEN)


def test_crops_of_rows_are_trained_on_first_and_whole_slices_at_the_end(scans):
    shapes = []
    settings = replace(BASE, samplings=(Probe(SAMPLING, shapes),), steps=10, crop=8, whole=0.3)
    seen = watched(scans, settings)
    assert [shape for shape, *_ in seen] == [(COILS, 8, SIZE)] * 7 + [(COILS, SIZE, SIZE)] * 3
    assert set(shapes) == {(SIZE, SIZE)}  # the mask is that of the whole slice
    for _, target, reference, scan in seen:
        # What is trained on is consistent: the measured k-space of the target.
        torch.testing.assert_close(reference, rss(target), rtol=1e-4, atol=1e-5)
        measured = scan.kspace * scan.scale
        difference = (ifft2c(measured) - target).abs().square().sum()
        assert difference < 0.5 * target.abs().square().sum()


@pytest.mark.parametrize("crop", [0, SIZE, 2 * SIZE])
def test_a_crop_that_is_none_leaves_slices_whole(scans, crop):
    seen = watched(scans, replace(BASE, crop=crop))
    assert {shape for shape, *_ in seen} == {(COILS, SIZE, SIZE)}


def test_masks_that_do_not_sample_columns_are_trained_on_whole(scans):
    seen = watched(scans, replace(BASE, samplings=(PoissonDisc(3, 6),), crop=8, whole=0.0))
    assert {shape for shape, *_ in seen} == {(COILS, SIZE, SIZE)}


def test_every_sampling_and_every_slice_and_every_flip_is_used(scans):
    shapes, others = [], []
    settings = replace(BASE, samplings=(Probe(SAMPLING, shapes), Probe(SAMPLING, others)), steps=24)
    seen = watched(scans, settings)
    assert len(shapes) + len(others) == 24
    assert min(len(shapes), len(others)) >= 6
    uses = torch.zeros(len(scans), 4)
    for which in range(len(scans)):
        images = ifft2c(scans[which].kspace)
        turned = [images, images.flip(-1), images.flip(-2), images.flip(-1, -2)]
        for way, one in enumerate(turned):
            uses[which, way] = sum(torch.equal(one, target[0]) for _, target, *_ in seen)
    assert uses.sum(1).tolist() == [6] * 4  # a round takes every slice once
    assert uses.sum(0).min() >= 2  # 6 are expected of each way to flip


def test_a_stored_reference_that_was_cropped_is_replaced(tmp_path):
    kspace = torch.stack([one.kspace for one in simulated(1)])
    write_volume(tmp_path / "a.h5", Volume(kspace, rss(ifft2c(kspace))[:, 2:-2, 2:-2]))
    ((_, target, reference, _),) = watched(SliceDataset(tmp_path), replace(BASE, steps=1))
    torch.testing.assert_close(reference, rss(target))


def test_the_callback_sees_every_update(scans):
    states = []
    found = trained(scans, BASE, after_step=states.append)
    assert [state.step for state in states] == [1, 2, 3, 4]
    assert [state.share for state in states] == [0.25, 0.5, 0.75, 1.0]
    assert [state.cost for state in states] == found.costs
    assert same(states[-1], found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samplings": ()}, "samplings must hold at least one sampling, got none"),
        ({"steps": None}, "a number of steps or of seconds, got neither"),
        ({"steps": 0}, "steps must be at least 1, or None, got 0"),
        ({"steps": -1}, "steps must be at least 1, or None, got -1"),
        ({"steps": None, "seconds": 0.0}, "seconds must be > 0, or None, got 0.0"),
        ({"steps": None, "seconds": -1.0}, "seconds must be > 0, or None, got -1.0"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be > 0, got nan"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"crop": -1}, r"crop and warmup must be >= 0 and whole in \[0, 1\], got -1, 2 and 0.2"),
        ({"warmup": -1}, "got 32, -1 and 0.2"),
        ({"whole": 1.5}, "got 32, 2 and 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        replace(BASE, **settings)


def test_undersampled_scans_are_refused(tmp_path):
    kspace = torch.stack([one.kspace for one in simulated(1)])
    mask = SAMPLING.mask((SIZE, SIZE), seeded())[0]
    write_volume(tmp_path / "a.h5", Volume(kspace * mask, mask=mask))
    message = r"a.h5: fully sampled k-space .* the mask in the file leaves out .* use other scans"
    with pytest.raises(InputError, match=message):
        trained(SliceDataset(tmp_path), BASE)


def for_coils(n_coils):
    sizes = {"n_phases": 2, "filters": 3, "features": 2, "feature_kernel": 3}
    return Network(replace(paper(n_coils), **sizes), seed=1)


def test_scans_of_fewer_coils_than_the_network_are_padded_with_zeros(scans, tmp_path):
    for file in scans.files:
        kspace = torch.stack([file.read_slice(k).kspace for k in range(file.n_slices)])
        padded = torch.cat([kspace, torch.zeros_like(kspace[:, :1])], dim=1)
        write_volume(tmp_path / file.path.name, Volume(padded, rss(ifft2c(kspace))))
    net = for_coils(3)
    assert same(trained(scans, BASE, net), trained(SliceDataset(tmp_path), BASE, net))


def test_scans_of_more_coils_than_the_network_are_compressed(scans):
    net, example = for_coils(1), draw_full(scans[0], seeded(), BASE.samplings)
    measured = fft2c(example.target) * example.mask
    strongest = torch.linalg.matrix_norm(measured.reshape(2, -1), 2)
    scan, matrix = example.prepared(net).scan, coil_matrix(measured, 1)
    torch.testing.assert_close(torch.linalg.vector_norm(scan.kspace), strongest)
    problem, start = example.problem(net, Loss(1.0, 0.0, 0.0))
    state = bl.rollout(problem.dynamics, start, net.controls(), problem.horizon)
    target = torch.einsum("nc,cyx->nyx", matrix, example.target)
    expected = (state[0] - target).abs().square().mean()
    torch.testing.assert_close(problem.terminal(state, net.controls()), expected)


def test_a_training_that_diverges_names_the_iteration(scans):
    with pytest.raises(bl.errors.DivergenceError, match=r"iteration .*smaller learning rate"):
        trained(scans, replace(BASE, steps=40, warmup=0, learning_rate=1e30))


@pytest.mark.parametrize("stop_at", [1, 3])
def test_an_interrupt_leaves_the_last_complete_weights(scans, tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr("applications.mri.training.keeping._SAVE_EVERY", -1.0)
    net, path, reported = network(), tmp_path / "w.safetensors", []
    keeper = Keeper(path, net, {"x": 1}, lambda stage, share: reported.append((stage, share)))
    kept = []

    def after_step(state):
        if state.step == stop_at:
            raise KeyboardInterrupt
        keeper(state)
        kept[:] = [tree.map_leaves(lambda x: x if x is None else x.clone(), state.control)]

    with pytest.raises(KeyboardInterrupt):
        train(net, net.controls(), scans, BASE, after_step)
    assert reported == [("training", 0.25), ("training", 0.5)][: stop_at - 1]
    if stop_at == 1:
        assert list(tmp_path.iterdir()) == []
        return
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    found = load_weights(path)
    assert found.record == {"x": 1}
    for new, old in zip(tree.leaves_of(found.control), tree.leaves_of(kept[0]), strict=True):
        assert new is old is None or torch.equal(new, old)


def test_a_keeper_saves_only_now_and_then(scans, tmp_path):
    net, path = network(), tmp_path / "w.safetensors"
    keeper = Keeper(path, net, {}, lambda stage, share: None)
    found = train(net, net.controls(), scans, BASE, keeper)
    assert not path.exists()  # four updates are done within _SAVE_EVERY
    keeper.save(found.control)
    assert same(load_weights(path), found)


@dataclass(frozen=True)
class Interrupted(Sampling):
    """Raises signals while the third update draws its mask."""

    n_signals: int
    events: list

    def mask(self, shape, generator):
        if len(self.events) == 2:
            for _ in range(self.n_signals):
                signal.raise_signal(signal.SIGINT)
            self.events.append("went on")
        return SAMPLING.mask(shape, generator)


@pytest.mark.parametrize(("n_signals", "expected"), [(1, [0.25, 0.5, "went on"]), (2, [0.25, 0.5])])
def test_an_interrupt_waits_for_the_end_of_the_update_and_a_second_does_not(
    scans, tmp_path, n_signals, expected
):
    net, events = network(), []
    keeper = Keeper(tmp_path / "w", net, {}, lambda stage, share: events.append(share))
    settings = replace(BASE, samplings=(Interrupted(n_signals, events),))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), keeper:
            trained(scans, settings, net, after_step=keeper)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert events == expected


def test_settings_are_described_by_plain_values():
    found = describe(replace(BASE, seconds=2.0))
    assert found["steps"] == 4
    assert found["seconds"] == 2.0
    assert found["samplings"] == repr((SAMPLING,))
    assert found["loss"] == repr(Loss())
    assert set(found) == set(vars(BASE))
