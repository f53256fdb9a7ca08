import math
from dataclasses import replace

import pytest
import torch
from reference import assert_same, moved, plain_gradients, plain_multipliers

import bilevel as bl
from applications.errors import InputError
from applications.mri.network.architecture import narrow, paper
from applications.mri.network.reconstruction import Loss, Network
from applications.mri.network.scan import Scan
from applications.mri.physics.consistency import (
    bounded,
    calibrate,
    consistent_image,
    inconsistency_normal,
    low_resolution_phase,
)
from applications.mri.physics.operators import fft2c, ifft2c, rss
from applications.mri.sampling import CartesianRandom, PoissonDisc
from applications.mri.simulation.simulate import simulate
from bilevel import tree

COILS, SIZE = 2, 24
CHECKPOINTINGS = [bl.Checkpointing(), bl.Checkpointing(block=None)]
PRESETS = {"paper": paper, "narrow": narrow}
every_preset = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
every_checkpointing = pytest.mark.parametrize("checkpointing", CHECKPOINTINGS, ids=repr)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(preset, **options):
    sizes = {"n_phases": 3, "filters": 3, "features": 2, "feature_kernel": 3}
    return Network(replace(preset(COILS), **sizes | options), seed=1)


def drawn(control, scale=0.1):
    """Weights moved at random, so that nothing is zero or symmetric by the start."""
    generator = seeded(7)
    return tree.map_leaves(
        lambda x: (
            x + scale * torch.randn(x.shape, dtype=x.dtype, generator=generator)
            if tree.is_variable(x)
            else x
        ),
        control,
    )


@pytest.fixture(scope="module")
def slices():
    axis = (torch.arange(SIZE) - SIZE // 2) / (SIZE / 2)
    disc = ((axis[:, None] ** 2 + axis[None, :] ** 2) < 0.6).float() * 0.8
    disc[8:12, 6:14] = 0.3
    return [simulate(disc, COILS, seeded(s), noise_std=1e-3) for s in (0, 1)]


@pytest.fixture(scope="module")
def full(slices):
    return torch.stack([one.kspace for one in slices])


@pytest.fixture(scope="module")
def masks():
    generator = seeded(2)
    return torch.stack([CartesianRandom(2, 0.25).mask((SIZE, SIZE), generator) for _ in range(2)])


def double(values):
    return tree.map_leaves(
        lambda x: (
            x.to(torch.complex128 if x.is_complex() else torch.float64)
            if tree.is_variable(x)
            else x
        ),
        values,
    )


def double_scan(scan):
    return Scan(**double(vars(scan)))


def double_problem(net, full, masks, loss):
    """The training problem in double precision, its observation and weights."""
    images = ifft2c(full.to(torch.complex128))
    scan = double_scan(net.prepare(full, masks))
    problem, start = net.training_problem(scan, images, rss(images), loss)
    return problem, start, double(drawn(net.controls()))


@every_checkpointing
@every_preset
def test_theorem_1_holds_for_the_network(full, masks, preset, checkpointing):
    net = network(preset)
    problem, start, control = double_problem(net, full, masks, Loss(1.0, 0.7, 0.1))
    found = bl.adjoint(
        problem,
        start,
        control,
        checkpointing=checkpointing,
        keep_states=True,
        keep_multipliers=True,
    )
    cost, gradient, observation_gradient = plain_gradients(problem, start, control)
    assert_same(found.cost, cost)
    assert_same(found.gradient, gradient)
    assert_same(found.observation_gradient, observation_gradient)
    assert all(tree.norm(g) > 0 for g in tree.leaves_of(gradient) if g is not None)
    assert_same(found.multipliers, plain_multipliers(problem, found.states, control))
    value = bl.lagrangian(problem, start, control, found.states, found.multipliers)
    assert_same(value, cost)


@every_checkpointing
@every_preset
def test_gradients_are_those_of_autograd_to_the_last_bit_without_a_running_cost(
    full, masks, preset, checkpointing
):
    problem, start, control = double_problem(network(preset), full, masks, Loss(initial=0.0))
    problem = replace(problem, running=None)
    found = bl.adjoint(problem, start, control, checkpointing=checkpointing)
    cost, gradient, _ = plain_gradients(problem, start, control)
    assert_same(found.cost, cost, rtol=0)
    assert_same(found.gradient, gradient, rtol=0)


@pytest.mark.parametrize(
    "loss",
    [
        Loss(),
        Loss(2.0, 0.0, 0.0),
        Loss(0.0, 3.0, 0.0),
        Loss(0.0, 0.0, 0.5),
        Loss(1.0, 0.5, 0.2),
    ],
    ids=repr,
)
@every_preset
def test_the_loss_is_its_formula(full, masks, preset, loss):
    net = network(preset)
    problem, start, control = double_problem(net, full, masks, loss)
    found = bl.adjoint(problem, start, control, keep_states=True)
    scan = double_scan(net.prepare(full, masks))
    first, last = found.states[0], found.states[-1]
    target = ifft2c(full.to(torch.complex128)) / scan.scale
    reference = rss(target)
    image = net.image(scan, last, control)
    expected = (
        loss.state * (last - target).abs().square().mean()
        + loss.combined * (image - reference).abs().mean()
        + loss.initial * (first - target).abs().mean()
    )
    torch.testing.assert_close(found.cost, expected)


def test_the_loss_of_a_perfect_reconstruction_is_zero_but_for_the_combination(full):
    net = network(paper, start_at_identity=True)
    mask = torch.ones(SIZE, SIZE, dtype=torch.bool)
    problem, start, _ = double_problem(net, full, mask, Loss(1.0, 0.0, 1.0))
    found = bl.adjoint(problem, start, double(net.controls()), keep_states=True)
    assert float(found.cost) < 1e-6  # prepare rounds k-space to complex64
    torch.testing.assert_close(
        found.final_state, ifft2c(full.to(torch.complex128)), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("rss_skip", [False, True])
@every_preset
def test_the_image_is_the_combination_that_the_last_phase_makes(full, masks, preset, rss_skip):
    net = network(preset, rss_skip=rss_skip)
    control = drawn(net.controls())
    scan = net.prepare(full, masks)
    found = net.reconstruct(scan, control)
    state = found.coil_images / scan.scale
    image = state if scan.phases is None else state * scan.phases.conj()
    weights = [p for name, p in control.steps[-1].items() if name.startswith("combine.")]
    for i, weight in enumerate(weights):
        image = torch.nn.functional.conv2d(image, weight, padding=1)
        if i < len(weights) - 1:
            image = torch.complex(image.real.relu(), image.imag.relu())
    expected = (image[:, 0] + rss(state) if rss_skip else image[:, 0]).abs()
    torch.testing.assert_close(net.image(scan, state, control), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.image, expected * scan.scale[:, 0], rtol=1e-4, atol=1e-5)


def test_what_is_prepared_for_the_paper_is_the_measurement(full, masks):
    scan = network(paper).prepare(full, masks)
    assert torch.equal(scan.kspace, full * masks[:, None])
    assert torch.equal(scan.start, scan.kspace)
    assert torch.equal(scan.mask, masks[:, None])
    assert (scan.normal, scan.phases) == (None, None)
    assert torch.equal(scan.scale, torch.ones(2, 1, 1, 1))


def test_what_is_prepared_for_light_is_scaled_filled_and_demodulated(full, masks):
    scan = network(narrow).prepare(full, masks)
    for i, mask in enumerate(masks):
        measured = full[i] * mask
        scale = rss(ifft2c(measured)).max()
        torch.testing.assert_close(scan.scale[i, 0, 0, 0], scale)
        torch.testing.assert_close(scan.kspace[i], measured / scale)
        normal = inconsistency_normal(calibrate(measured / scale, mask))
        torch.testing.assert_close(scan.normal[i], bounded(normal))
        filled = consistent_image(measured / scale, mask, normal, 16)
        torch.testing.assert_close(scan.start[i], fft2c(filled))
        assert torch.equal(scan.phases[i], low_resolution_phase(scan.kspace[i], mask))


@every_preset
def test_one_mask_serves_a_batch_and_samples_do_not_mix(full, masks, preset):
    net = network(preset)
    control = drawn(net.controls())
    together = net.reconstruct(net.prepare(full, masks), control)
    for i in range(2):
        alone = net.reconstruct(net.prepare(full[i : i + 1], masks[i]), control)
        torch.testing.assert_close(together.image[i], alone.image[0], rtol=1e-4, atol=1e-5)
    shared = net.prepare(full, masks[0])
    assert torch.equal(shared.mask, masks[:1, None].expand(2, 1, -1, -1))


@every_preset
def test_values_outside_the_mask_are_ignored(full, masks, preset):
    net = network(preset)
    first, second = net.prepare(full, masks), net.prepare(full * masks[:, None], masks)
    for name, value in vars(first).items():
        assert value is None or torch.equal(value, getattr(second, name))


def test_light_does_not_depend_on_the_units_of_the_scanner(full, masks):
    net = network(narrow)
    control = drawn(net.controls())
    found = net.reconstruct(net.prepare(full, masks), control)
    small = net.reconstruct(net.prepare(1e-6 * full, masks), control)
    torch.testing.assert_close(small.data_residual, found.data_residual, rtol=1e-4, atol=0)
    for name in ("image", "coil_images"):
        expected, scaled = getattr(found, name), 1e6 * getattr(small, name)
        atol = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(scaled, expected, rtol=0, atol=atol)


def test_untrained_light_leaves_the_coil_images_to_data_consistency(full, masks):
    net = network(narrow)
    scan = net.prepare(full, masks)
    u = ifft2c(scan.start)
    for _ in range(3):
        data = ifft2c(scan.mask * (fft2c(u) - scan.kspace))
        u = u - data - 0.1 * torch.einsum("byxoi,biyx->boyx", scan.normal, u)
    found = net.reconstruct(scan, net.controls())
    torch.testing.assert_close(found.coil_images, u * scan.scale, rtol=1e-4, atol=1e-5)


@every_preset
def test_the_reconstruction_is_the_plain_loop(full, masks, preset):
    net = network(preset)
    control = drawn(net.controls())
    scan = net.prepare(full, masks)
    dynamics = net.dynamics(scan)
    state = dynamics.init(scan.start, control.initial)
    for t, theta in enumerate(control.steps, 1):
        state = dynamics.step(state, theta, t)
    found = net.reconstruct(scan, control)
    torch.testing.assert_close(found.coil_images, state * scan.scale)


def test_the_data_residual_is_relative_to_what_was_measured(full, masks):
    net = network(narrow)
    scan = net.prepare(full, masks)
    found = net.reconstruct(scan, drawn(net.controls()))
    for i, residual in enumerate(found.data_residual):
        measured = full[i] * masks[i]
        defect = fft2c(found.coil_images[i]) * masks[i] - measured
        torch.testing.assert_close(residual, defect.norm() / measured.norm())


@pytest.mark.parametrize("top", [0, 5, SIZE - 8])
def test_a_crop_of_rows_is_the_scan_of_these_rows(full, masks, top):
    rows = slice(top, top + 8)
    found = network(narrow).prepare(full, masks).crop_rows(top, 8)
    whole = network(narrow).prepare(full, masks)
    # The mask samples whole columns, so that to sample and to crop commute.
    cropped = ifft2c(full)[..., rows, :]
    expected = fft2c(cropped) * masks[:, None, rows] / whole.scale
    torch.testing.assert_close(found.kspace, expected, rtol=0, atol=1e-5)
    images = ifft2c(whole.start)[..., rows, :]
    torch.testing.assert_close(ifft2c(found.start), images, rtol=0, atol=1e-5)
    assert torch.equal(found.normal, whole.normal[:, rows])
    assert torch.equal(found.phases, whole.phases[..., rows, :])
    assert torch.equal(found.mask, masks[:, None, rows])
    assert torch.equal(found.scale, whole.scale)


def test_a_crop_of_a_scan_that_samples_positions_is_refused(full):
    mask = PoissonDisc(3, 6).mask((SIZE, SIZE), seeded())
    scan = network(paper).prepare(full, mask)
    with pytest.raises(InputError, match="a crop of rows needs masks that sample whole columns"):
        scan.crop_rows(0, 8)


OPTIMIZERS = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=1e-3), 3),
    "Adam": (lambda p: torch.optim.Adam(p, lr=1e-3), 3),
    "LBFGS": (lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3), 1),
}


@pytest.mark.parametrize(
    ("preset", "optimizer"),
    [
        *((paper, "SGD"), (narrow, "Adam"), (paper, "LBFGS")),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in ((narrow, "SGD"), (paper, "Adam"), (narrow, "LBFGS"))
        ),
    ],
)
def test_optimisers_of_torch_lower_the_loss(full, masks, preset, optimizer):
    net = network(preset)
    images = ifft2c(full)
    problem, start = net.training_problem(
        net.prepare(full, masks), images, rss(images), Loss(initial=0.5)
    )
    make, steps = OPTIMIZERS[optimizer]
    found = bl.ControlSolver(problem, make).solve(net.controls(), start, steps=steps)
    assert found.cost < found.costs[0]


@every_preset
def test_an_update_by_sgd_is_that_of_autograd(full, masks, preset):
    problem, start, control = double_problem(network(preset), full, masks, Loss())
    _, gradient, _ = plain_gradients(problem, start, control)
    solver = bl.ControlSolver(problem, lambda p: torch.optim.SGD(p, lr=0.01))
    found = solver.solve(control, start, steps=1)
    assert_same(found.control, moved(control, gradient, -0.01))


def test_weights_at_zero_images_have_finite_gradients(masks):
    net = network(paper)
    nothing = torch.zeros(2, COILS, SIZE, SIZE, dtype=torch.complex64)
    problem, start = net.training_problem(
        net.prepare(nothing, masks), nothing, nothing[:, 0].abs(), Loss(1.0, 1.0, 1.0)
    )
    found = bl.adjoint(problem, start, net.controls())
    assert math.isfinite(tree.norm(found.gradient))


BAD = [
    (lambda f, m: (f[:, :1], m), "was built for 2 coils, kspace has 1; use weights trained"),
    (lambda f, m: (f[0], m), r"kspace must be complex of shape .* got torch.complex64 \(2, 24, 2"),
    (lambda f, m: (f.real, m), r"kspace must be complex .* got torch.float32 \(2, 2, 24, 24\)"),
    (lambda f, m: (f, 0 * m[0] > 0), "mask must keep at least one position, it keeps none"),
    (lambda f, m: (f, m[0, :, :20]), r"mask must have shape \(24, 24\), got \(24, 20\)"),
    (lambda f, m: (f, m[0, :1]), r"mask must have shape \(24, 24\), got \(1, 24\)"),
    (lambda f, m: (f, m[0, 0]), r"mask must have shape \(24, 24\), got \(24,\)"),
    (lambda f, m: (f, m[:, :, :20]), r"mask must have shape \(24, 24\), got \(24, 20\)"),
    (lambda f, m: (f, m[:1]), r"one mask for each of the 2 samples, got \(1, 24, 24\)"),
    (lambda f, m: (f, m[:, None]), r"mask must have shape \(24, 24\), got \(2, 1, 24, 24\)"),
    (lambda f, m: (f, m.float()), "mask must be boolean, got torch.float32"),
    (lambda f, m: (f * math.nan, m), "kspace must be finite; leave out the slice"),
    (lambda f, m: (f / 0, m), "kspace must be finite; leave out the slice"),
]


@every_preset
@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_data_that_do_not_fit_are_refused(full, masks, preset, change, message):
    with pytest.raises(InputError, match=message):
        network(preset).prepare(*change(full, masks))


def test_a_scan_of_zeros_has_no_scale(full, masks):
    with pytest.raises(InputError, match="kspace is zero wherever the mask samples"):
        network(narrow).prepare(0 * full, masks)


def test_too_small_a_centre_for_self_consistency_is_refused(full):
    mask = CartesianRandom(3, 0.1).mask((SIZE, SIZE), seeded())
    with pytest.raises(InputError, match="train a network of the preset paper"):
        network(narrow).prepare(full, mask)
