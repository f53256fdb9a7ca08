from dataclasses import replace

import pytest
import torch

import bilevel as bl
from applications.errors import InputError
from applications.mri.data import SliceDataset, Volume, fully_sampled, write_volume
from applications.mri.evaluation.methods import network_methods
from applications.mri.meta.experiment import adapt_models
from applications.mri.meta.learning import column, learn
from applications.mri.meta.losses import TaskLosses
from applications.mri.meta.results import ExperimentSettings
from applications.mri.meta.settings import Ablation, MetaSettings, Rule
from applications.mri.meta.solvers import meta_solver, penalty_objective
from applications.mri.network.architecture import narrow, paper
from applications.mri.network.reconstruction import Loss, Network
from applications.mri.network.weights import Trained, named
from applications.mri.physics.coil_counts import coil_matrix, with_coils
from applications.mri.physics.operators import fft2c, ifft2c, rss
from applications.mri.sampling import CartesianRandom
from applications.mri.simulation.simulate import simulate
from applications.mri.tasks.task_list import TaskSettings
from applications.mri.tasks.tasks import open_tasks
from applications.mri.training.draws import Minibatches
from applications.mri.training.examples import PreparedExample
from applications.mri.training.schedules import Cosine
from applications.settings import Method
from bilevel import tree

COILS, SIZE = 2, 16
GRAPHS = bl.Checkpointing(block=None)  # tiny networks: keep what sweeps would compute again
LOSS = Loss(1.0, 0.7, 0.1)
SETTINGS = MetaSettings(
    evaluations=16,
    inner_steps=2,
    learning_rate=0.01,
    warmup=0,
    learn_share=1.0,
    loss=LOSS,
    checkpointing=GRAPHS,
)
QUICK = replace(SETTINGS, evaluations=8)  # two rounds: whether a setting matters shows at once
every_ablation = pytest.mark.parametrize("ablation", list(Ablation))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(preset=paper, n_coils=COILS, **options):
    sizes = {"n_phases": 2, "filters": 3, "features": 2, "feature_kernel": 3}
    return Network(replace(preset(n_coils), **sizes | options), seed=1)


def volume(path, seed, n_slices=2, n_coils=COILS, rows=SIZE):
    """Discs with a hole, at other places for other seeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = ((torch.arange(n) - n // 2) / (n / 2) for n in (rows, SIZE))
    generator = seeded(seed)
    slices = []
    for _ in range(n_slices):
        dy, dx = 0.3 * torch.rand(2, generator=generator) - 0.15
        image = (((y + dy)[:, None] ** 2 + (x + dx)[None, :] ** 2) < 0.6).float() * 0.8
        image[5:8, 4:9] = 0.3
        slices.append(simulate(image, n_coils, generator, noise_std=1e-3).kspace)
    write_volume(path, Volume(torch.stack(slices)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for seed, role in enumerate(("train", "validation", "test")):
        volume(folder / "disc" / role / "a.h5", seed, 3)
        volume(folder / "mixed" / role / "a.h5", seed, 2)
        volume(folder / "mixed" / role / "b.h5", seed + 3, 1, n_coils=3, rows=20)
    return folder


def task(folder, name, **fields):
    common = {"acceleration": 2.0, "center": 0.25, "scans": folder / fields.pop("of", "disc")}
    return TaskSettings(name, **common | fields)


@pytest.fixture(scope="module")
def tasks(folder):
    """Two tasks to train on, of which the references of one are noise; two to validate on."""
    settings = [
        task(folder, "good"),
        task(folder, "noise", target_noise=3.0, roles=("train",)),
        task(folder, "other", mask="equispaced", roles=("validation", "test")),
    ]
    return open_tasks(settings, folder)


def double(values):
    def convert(x):
        if not tree.is_variable(x):
            return x
        return x.to(torch.complex128 if x.is_complex() else torch.float64)

    return tree.map_leaves(convert, values)


def double_batch(batch):
    return tuple(
        tuple(
            PreparedExample(
                replace(x.scan, **double(vars(x.scan))), *double((x.target, x.reference))
            )
            for x in examples
        )
        for examples in batch
    )


@pytest.fixture(scope="module")
def problem(tasks):
    """Losses, double minibatches by step, and weights off their start."""
    net = network()
    train, validation = (
        Minibatches(net, tasks.sources(role), role) for role in ("train", "validation")
    )
    control = double(net.controls())
    control = tree.map_leaves(
        lambda x: (
            None
            if x is None
            else x + 0.05 * torch.randn(x.shape, dtype=x.dtype, generator=seeded(7))
        ),
        control,
    )
    batches = [double_batch(train.draw(t)) for t in range(3)]
    losses = TaskLosses(net, LOSS, GRAPHS)
    return losses, bl.ByStep(lambda t: batches[t % 3]), double_batch(validation.draw(0)), control


def test_the_loss_of_a_task_is_the_mean_training_loss_of_its_slices(tasks, folder):
    net = network()
    mixed = open_tasks([task(folder, "mixed", of="mixed")], folder).sources("train")
    (examples,) = Minibatches(net, mixed, "train", size=3).draw(0)
    assert sorted(tuple(one.target.shape) for one in examples) == [
        (1, COILS, 20, SIZE),
        (2, COILS, SIZE, SIZE),
    ]
    losses = TaskLosses(net, LOSS)
    control = net.controls()
    costs = []
    for one in examples:
        found, start = net.training_problem(one.scan, one.target, one.reference, LOSS)
        costs.append(len(one.target) * bl.adjoint(found, start, control).cost)
    torch.testing.assert_close(losses(control, (examples,)), (sum(costs) / 3)[None])
    assert losses.evaluations == 3


def test_a_minibatch_is_a_function_of_its_step_and_seed(tasks):
    def drawn(step, **settings):
        batches = Minibatches(network(), tasks.sources("train"), "train", **settings)
        batches.draw(step + 1)
        return batches.draw(step)[0][0]

    first = drawn(3)
    for one, same in ((drawn(3), True), (drawn(4), False), (drawn(3, seed=1), False)):
        assert torch.equal(one.scan.kspace, first.scan.kspace) == same
    assert drawn(3, size=2).target.shape[0] == 2
    assert drawn(3, size=100).target.shape[0] == 3  # no slice twice
    cropped = drawn(3, crop=6)
    assert cropped.target.shape == (1, COILS, 6, SIZE)
    rows = [
        i for i in range(SIZE - 5) if torch.equal(cropped.target, first.target[..., i : i + 6, :])
    ]
    assert len(rows) == 1


def test_an_example_is_a_slice_of_the_task_with_the_coils_of_the_network(folder):
    settings = [task(folder, "mixed", of="mixed")]
    (one,) = open_tasks(settings, folder).every
    slices = {s.kspace.shape[-2]: s for s in SliceDataset([one.parts["train"].files[1].path])}
    full = ifft2c(fully_sampled(slices[20])[0])
    for n_coils in (2, 4):
        net = network(n_coils=n_coils)
        batches = Minibatches(net, (one.source("train"),), "train", size=3)
        example = next(x for x in batches.of_source(0, 0) if x.target.shape[-2] == 20)
        reference = example.reference[0]
        flips = [
            f for f in ((), (-2,), (-1,), (-2, -1)) if torch.equal(reference, rss(full.flip(f)))
        ]
        images = full.flip(flips[0])
        measured = example.scan.mask[0, 0]
        if n_coils == 4:
            assert torch.equal(example.target[0, :3], images)
            assert not example.target[0, 3:].any()
        else:
            matrix = coil_matrix(fft2c(images) * measured, 2)
            torch.testing.assert_close(example.target[0], with_coils(matrix, images))
        assert net.architecture.n_coils == example.scan.kspace.shape[1]


def test_bad_references_are_noise_that_stays_the_same_for_a_slice(tasks):
    """Whatever the flips of the image are, by which the target differs from the noise."""
    batches = Minibatches(network(), tasks.sources("train"), "train", size=3)
    images = [ifft2c(one.kspace) for one in tasks.of("train")[1].parts["train"]]
    flips = ((), (-2,), (-1,), (-2, -1))

    def noises(step):
        targets = batches.draw(step)[1][0].target
        return [[target - image.flip(f) for target in targets for f in flips] for image in images]

    for first, again in zip(noises(0), noises(5), strict=True):
        common = [x for x in first if any(torch.allclose(x, y, atol=1e-4) for y in again)]
        assert common
    good, noise = batches.draw(0)
    torch.testing.assert_close(noise[0].reference, rss(noise[0].target))
    level = noise[0].target.abs().square().mean().sqrt()  # its largest magnitude times 3
    assert level > 5 * good[0].target.abs().square().mean().sqrt()


@pytest.mark.parametrize(("m", "rule"), [(None, Rule.ADAM), (2, Rule.SGD)])
def test_the_hypergradient_in_the_task_weights_is_exact(problem, m, rule):
    losses, train, validation, control = problem
    weights = bl.TaskWeights(2, m)
    solver = meta_solver(losses, weights, replace(SETTINGS, optimizer=rule), 0.01)
    params = weights.stacked(control)
    alpha = 0.3 * torch.randn(weights.shape, dtype=torch.float64, generator=seeded(3))
    found = solver.hypergradient(params, alpha, train, validation).gradient
    unrolled = replace(solver, method=bl.Unrolled())
    expected = unrolled.hypergradient(params, alpha, train, validation).gradient
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)

    slopes = torch.zeros_like(alpha)
    for place in range(alpha.numel()):
        along = torch.zeros_like(alpha)
        along.view(-1)[place] = 1e-7  # short: ReLU, soft thresholds and magnitudes have kinks
        up, down = (
            solver.value(params, alpha + sign * along, train, validation) for sign in (1, -1)
        )
        slopes.view(-1)[place] = (up - down) / 2e-7
    torch.testing.assert_close(found, slopes, rtol=1e-5, atol=1e-8)
    assert found.abs().min() > 1e-7


def test_sweeps_through_the_phases_give_the_same_hypergradient(problem):
    losses, train, validation, control = problem
    alpha = torch.tensor([0.2, -0.1], dtype=torch.float64)
    found = []
    for checkpointing in (GRAPHS, bl.Checkpointing()):
        each = TaskLosses(losses.network, LOSS, checkpointing)
        solver = meta_solver(each, bl.TaskWeights(2), SETTINGS, 0.01)
        found.append(solver.hypergradient(control, alpha, train, validation).gradient)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-14)


def test_the_gradient_of_the_penalty_method_is_exact(problem):
    losses, train, validation, control = problem
    batch, alpha = train.value(0), torch.tensor([0.2, -0.1], dtype=torch.float64)
    penalty, weights = 0.3, bl.TaskWeights(2)
    sigma = weights.sigma(alpha)

    def controls(examples):
        for one in examples:
            yield losses.network.training_problem(one.scan, one.target, one.reference, LOSS)

    theta = tree.map_leaves(lambda x: None if x is None else x.clone().requires_grad_(), control)
    found = alpha.clone().requires_grad_()
    objective = penalty_objective(losses, weights, penalty)(theta, found, batch, validation)
    objective.backward()
    # The formula, from gradients and Hessian products of every task on its own.
    each = [next(controls(examples)) for examples in batch]
    gradients = [bl.adjoint(p, start, control).gradient for p, start in each]
    total = tree.map_leaves(
        lambda *g: None if g[0] is None else sum(s * x for s, x in zip(sigma, g, strict=True)),
        *gradients,
    )
    products = [bl.hvp(p, start, control, total).product for p, start in each]
    judged = [bl.adjoint(*next(controls(examples)), control) for examples in validation]
    expected = tree.map_leaves(
        lambda v, w, *h: (
            None
            if v is None
            else v + w + penalty * sum(s * x for s, x in zip(sigma, h, strict=True))
        ),
        *(one.gradient for one in judged),
        *products,
    )
    for new, truth in zip(tree.leaves_of(theta), tree.leaves_of(expected), strict=True):
        if truth is not None:
            torch.testing.assert_close(new.grad, truth, rtol=1e-9, atol=1e-12)
    inner = torch.stack([tree.inner(g, total) for g in gradients])
    in_sigma = penalty * sigma * (inner - (sigma * inner).sum())
    torch.testing.assert_close(found.grad, in_sigma, rtol=1e-9, atol=1e-13)
    value = sum(one.cost for one in judged) + penalty / 2 * tree.inner(total, total)
    torch.testing.assert_close(objective.detach(), value, rtol=1e-9, atol=0)


LEARNING = replace(SETTINGS, evaluations=48, learning_rate=0.02, outer_rate=1.0, penalty_rate=1.0)


@pytest.mark.parametrize(
    "ablation",
    [
        Ablation.VECTOR,
        pytest.param(Ablation.MATRIX, marks=pytest.mark.slow),
        pytest.param(Ablation.PENALTY, marks=pytest.mark.slow),
    ],
)
def test_a_task_whose_references_are_noise_loses_its_weight(tasks, ablation):
    net = network(n_phases=1)
    found = learn(ablation, net, net.controls(), tasks, LEARNING)
    assert found.sigma.shape == ((2, 2) if ablation == Ablation.MATRIX else (2,))
    torch.testing.assert_close(found.sigma.sum(0), torch.ones(found.sigma.shape[1:]))
    good, noise = found.sigma
    assert (noise < 0.35).all()
    assert (good > 0.65).all()
    assert found.values[-1] < found.values[0]
    assert set(found.models) == ({"good", "other"} if found.sigma.ndim == 2 else {"all"})


@every_ablation
def test_all_ways_keep_to_one_budget(tasks, ablation):
    net = network(n_phases=1)
    shares = []
    found = learn(ablation, net, net.controls(), tasks, QUICK, shares.append)
    a_round = {"uniform": 4, "vector": 6, "matrix": 10, "penalty": 4}[ablation]
    assert found.evaluations == a_round * found.updates
    assert 8 <= found.evaluations < 8 + a_round
    assert found.inner_steps == found.updates * (1 if ablation == Ablation.PENALTY else 2)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(found.values) == (0 if ablation == Ablation.UNIFORM else found.updates)
    spent = learn(
        ablation, net, net.controls(), tasks, replace(SETTINGS, evaluations=None, seconds=0.1)
    )
    assert 0.1 <= spent.seconds < 5


def test_equal_weights_are_trained_as_by_adam(tasks):
    """By `torch.optim.Adam` on the mean loss: two rounds, at the rates of the rounds."""
    net = network(n_phases=1)
    settings = replace(SETTINGS, evaluations=8)
    found = learn(Ablation.UNIFORM, net, net.controls(), tasks, settings)
    losses = TaskLosses(net, LOSS, GRAPHS)
    batches = Minibatches(net, tasks.sources("train"), "train")
    control = tree.map_leaves(lambda x: None if x is None else x.clone(), net.controls())
    leaves = [x.requires_grad_() for x in tree.leaves_of(control) if x is not None]
    adam = torch.optim.Adam(leaves, 0.01, betas=(0.9, 0.99))
    for t in range(1, 5):
        adam.param_groups[0]["lr"] = 0.01 if t < 3 else 0.005  # half of the cosine
        adam.zero_grad()
        losses(control, batches.draw(t)).mean().backward()
        adam.step()
    for new, old in zip(named(found.models["all"]).values(), named(control).values(), strict=True):
        torch.testing.assert_close(new, old.detach(), rtol=1e-4, atol=1e-5)


CHANGES = {
    "method": {"method": Method.ONE_STEP},
    "optimizer": {"optimizer": Rule.SGD},
    "inner_steps": {"inner_steps": 3},
    "learning_rate": {"learning_rate": 0.02},
    "warmup": {"warmup": 10},
    "outer_rate": {"outer_rate": 0.3},
    "outer_clip": {"outer_clip": 10.0},
    "batch": {"batch": 2},
    "crop": {"crop": 8},
    "entropy": {"entropy": 0.5},
    "floor": {"floor": 0.3},
    "loss": {"loss": Loss()},
    "seed": {"seed": 1},
}


@pytest.fixture(scope="module")
def vector(tasks):
    return alpha_of(tasks, QUICK)


def alpha_of(tasks, settings, ablation=Ablation.VECTOR):
    net = network(n_phases=1)
    return learn(ablation, net, net.controls(), tasks, settings).sigma


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_setting_matters(tasks, vector, change):
    assert not torch.equal(alpha_of(tasks, replace(QUICK, **change)), vector)


def test_task_weights_stay_where_they_are_after_their_share_of_the_budget(tasks, monkeypatch):
    # The first hypergradient is to move them, so that the second round has weights of its own.
    descent = "applications.mri.meta.learning.AgreeingDescent"
    monkeypatch.setattr(descent, lambda leaves, rate, _clip: torch.optim.Adam(leaves, rate))
    net = network(n_phases=1)
    settings = replace(SETTINGS, optimizer=Rule.SGD, learn_share=1e-6)
    once = learn(Ablation.VECTOR, net, net.controls(), tasks, replace(settings, evaluations=1))
    found = learn(Ablation.VECTOR, net, net.controls(), tasks, replace(settings, evaluations=9))
    assert len(once.values) == len(found.values) == once.updates == 1
    assert (found.updates, found.inner_steps, found.evaluations) == (2, 4, 10)
    assert torch.equal(once.alpha, found.alpha)
    assert float((found.sigma - 0.5).abs().max()) > 0.1
    # The second round is of the weighted sum with these weights, at the rate of its share.
    losses, batches = (
        TaskLosses(net, LOSS, GRAPHS),
        Minibatches(net, tasks.sources("train"), "train"),
    )
    model, rate = once.models["all"], 0.01 * Cosine().factor(6 / 9)
    leaves, structure = tree.flatten(model)
    for t in (3, 4):
        points = [None if x is None else x.detach().requires_grad_() for x in leaves]
        batch = batches.draw(t)
        (found.sigma * losses(tree.unflatten(structure, points), batch)).sum().backward()
        leaves = [None if x is None else x.detach() - rate * x.grad for x in points]
    model = tree.unflatten(structure, leaves)
    for new, old in zip(named(found.models["all"]).values(), named(model).values(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6)


def test_each_column_of_a_matrix_settles_too(tasks):
    net = network(n_phases=1)
    settings = replace(SETTINGS, learn_share=0.3, evaluations=40)
    found = learn(Ablation.MATRIX, net, net.controls(), tasks, settings)
    assert 1 <= len(found.values) < found.updates
    assert len(found.models) == found.sigma.shape[1]


def test_training_is_deterministic_by_its_seed(tasks, vector):
    assert torch.equal(alpha_of(tasks, QUICK), vector)


@pytest.mark.parametrize("change", [{"penalty": 0.1}, {"penalty_rate": 0.5}], ids=str)
def test_a_setting_of_the_penalty_method_matters(tasks, change):
    found, other = (
        alpha_of(tasks, settings, Ablation.PENALTY)
        for settings in (QUICK, replace(QUICK, **change))
    )
    assert not torch.equal(found, other)


def test_a_model_adapted_to_a_task_has_moved_by_its_weight(tasks):
    net = network(n_phases=1)
    begun = Trained(net, net.controls(), {})
    training = replace(QUICK, optimizer=Rule.SGD)
    settings = ExperimentSettings(training, adapt_steps=1, adapt_slices=2)
    for ablation in (Ablation.VECTOR, Ablation.MATRIX):
        learned = learn(ablation, net, begun.control, tasks, training)
        found = adapt_models(begun, learned, tasks, training, settings)
        matrix = ablation == Ablation.MATRIX
        assert set(found) == ({"good"} if matrix else {"good", "noise"})
        model = learned.models["good" if matrix else "all"]
        (examples, _) = Minibatches(net, tasks.sources("train"), "train", 2).draw(0)
        (one,) = examples
        problem, start = net.training_problem(one.scan, one.target, one.reference, LOSS)
        gradient = named(bl.adjoint(problem, start, model).gradient)
        size = training.learning_rate * learned.sigma.reshape(2, -1)[0, 0]
        for name, x in named(found["good"]).items():
            torch.testing.assert_close(x, named(model)[name] - size * gradient[name])


def test_scans_of_any_coil_count_are_reconstructed():
    net = network(narrow, n_coils=3)
    trained = Trained(net, net.controls(), {})
    mask = CartesianRandom(2, 0.4).mask((SIZE, SIZE), seeded())
    for n_coils in (2, 3, 5):
        kspace = torch.randn(n_coils, SIZE, SIZE, dtype=torch.complex64, generator=seeded(1)) * mask
        fitted = with_coils(coil_matrix(kspace, 3), kspace)
        expected = net.reconstruct(net.prepare(fitted[None], mask), trained.control).image[0]
        assert torch.equal(network_methods(trained)["ours"](kspace, mask), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluations": None}, "a training needs a budget, seconds or evaluations, got neither"),
        ({"seconds": 0.0}, "seconds must be > 0"),
        ({"evaluations": 0}, "evaluations must be > 0"),
        ({"inner_steps": 0}, "inner_steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"penalty": -1.0}, "penalty must be > 0"),
        ({"learn_share": 0.0}, "learn_share must be > 0 and <= 1, got 0"),
        ({"crop": -1}, "crop and warmup must be >= 0"),
    ],
)
def test_a_wrong_setting_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        replace(SETTINGS, **change)


def test_a_wrong_experiment_is_refused():
    with pytest.raises(InputError, match="ablations must be one or more, each once, got none"):
        ExperimentSettings(SETTINGS, ())
    with pytest.raises(InputError, match="seeds and adapt_slices must be at least 1"):
        ExperimentSettings(SETTINGS, seeds=0)


def test_a_column_of_stacked_weights_is_one_model():
    control = network(n_phases=1).controls()
    stacked = bl.TaskWeights(1, 3).stacked(control)
    for x, y in zip(named(column(stacked, 1)).values(), named(control).values(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.cuda
@pytest.mark.parametrize("ablation", [Ablation.VECTOR, Ablation.MATRIX])
def test_a_meta_training_on_a_gpu_is_that_of_the_cpu(tasks, ablation):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    net = network(n_phases=1)
    truth, found = (
        learn(ablation, net, net.controls(), tasks, replace(SETTINGS, device=device))
        for device in ("cpu", "cuda")
    )
    assert found.values == pytest.approx(truth.values, rel=1e-3)
    torch.testing.assert_close(found.alpha, truth.alpha, rtol=1e-2, atol=1e-3)
    kept = [x for model in found.models.values() for x in named(model).values()]
    assert {x.device.type for x in kept} == {"cpu"}
