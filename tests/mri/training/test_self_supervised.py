"""Self-supervised training: what enters the network, what the loss, and what is never seen."""

from dataclasses import replace

import pytest
import torch
from training_cases import BASE, SIZE, network, same, seeded, simulated, trained

import bilevel as bl
from applications.errors import InputError
from applications.mri.data import SliceDataset, Volume, write_volume
from applications.mri.network.architecture import light, narrow, paper
from applications.mri.network.reconstruction import Loss, Network
from applications.mri.physics.operators import fft2c, ifft2c, rss
from applications.mri.sampling import CartesianRandom, PoissonDisc
from applications.mri.training.self_supervised import SelfSupervision, draw_split
from applications.mri.training.validation import Validation
from bilevel import tree

SPLIT = SelfSupervision(share=0.4, centre=8)
SAMPLINGS = [CartesianRandom(2, 0.25), PoissonDisc(3, 8)]


def undersampled(folder, n_slices=2, sampling=SAMPLINGS[1], noise=None, *, with_mask=True):
    """A file of simulated slices, and their full k-space."""
    full = torch.stack([one.kspace for one in simulated(n_slices, seed=5)])
    mask = sampling.mask((SIZE, SIZE), seeded(6))
    kspace = full * mask
    if noise is not None:
        kspace = kspace + noise * (~mask) * torch.randn(full.shape, generator=seeded(7))
    write_volume(folder / "a.h5", Volume(kspace, mask=mask if with_mask else None))
    return SliceDataset(folder), full, mask


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
@pytest.mark.parametrize("size", [SIZE, SIZE + 1])
def test_the_two_sets_are_disjoint_and_cover_the_mask_and_the_centre_stays(sampling, size):
    mask = sampling.mask((size, size), seeded())
    first = SPLIT.split(mask, seeded(1))
    given, held = first
    assert not bool((given & held).any())
    assert torch.equal(given | held, mask)
    middle = slice(size // 2 - 4, size // 2 + 4)
    centre = torch.zeros_like(mask)
    centre[middle, middle] = True
    assert torch.equal(given & centre, mask & centre)
    n_outside = int((mask & ~centre).sum())
    assert int(held.sum()) == round(0.4 * n_outside)
    again, other = SPLIT.split(mask, seeded(1)), SPLIT.split(mask, seeded(2))
    assert torch.equal(again[1], held)
    assert not torch.equal(other[1], held)


def test_positions_are_held_out_by_a_gaussian_of_their_frequency():
    """The first position drawn has the probability of the density; a chi-square of its rings."""
    mask = torch.ones(16, 16, dtype=torch.bool)
    split = SelfSupervision(share=1 / 240, centre=4, width=0.2)  # one position of 240
    generator, n = seeded(), 1500
    held = sum(split.split(mask, generator)[1].double() for _ in range(n)).flatten()
    axis = (torch.arange(16, dtype=torch.float64) - 8) / 16
    squares = (axis[:, None] ** 2 + axis**2).flatten()
    density = torch.exp(-squares / (2 * 0.2**2))
    inner = torch.zeros(16, 16, dtype=torch.bool)
    inner[6:10, 6:10] = True
    density[inner.flatten()] = 0
    expected = n * density / density.sum()
    rings = (squares * 256 / 16).long()
    found, wanted = (
        torch.zeros(9, dtype=torch.float64).index_add_(0, rings, x) for x in (held, expected)
    )
    seen = wanted > 5
    chi = ((found - wanted) ** 2 / wanted)[seen].sum()
    assert float(chi) < 27  # 1 in 1000 at up to 8 degrees of freedom


@pytest.mark.parametrize("preset", [paper, narrow])
def test_unsampled_positions_change_neither_loss_nor_gradient(tmp_path, preset):
    net = network(preset)
    found = []
    for folder, noise in (("zeros", None), ("noise", 10.0)):
        (tmp_path / folder).mkdir()
        slices, _, _ = undersampled(tmp_path / folder, noise=noise)
        example = draw_split(slices[0], seeded(3), SPLIT)
        found.append(bl.adjoint(*example.problem(net, Loss()), net.controls()))
    assert float(found[0].cost) == float(found[1].cost)
    leaves = (tree.leaves_of(one.gradient) for one in found)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*leaves, strict=True))


def test_positions_held_out_do_not_reach_the_network_and_are_all_that_the_loss_sees(tmp_path):
    slices, _, _ = undersampled(tmp_path)
    net = network()
    control = net.controls()
    example = draw_split(slices[0], seeded(3), SPLIT)
    changed = example.kspace + 3 * example.held * torch.randn(SIZE, SIZE, generator=seeded(4))
    (problem, start), (other, other_start) = (
        e.problem(net, Loss()) for e in (example, replace(example, kspace=changed))
    )
    assert torch.equal(start, other_start)
    assert not bool((start * example.held).any())
    state = bl.rollout(problem.dynamics, start, control, problem.horizon)
    assert torch.equal(state, bl.rollout(other.dynamics, start, control, other.horizon))
    k = fft2c(state)[0]
    d, f = ((x * example.held).flatten().abs() for x in (k - example.kspace, example.kspace))
    misfit = d.square().sum().sqrt() / f.square().sum().sqrt() + d.sum() / f.sum()
    image = net.image(net.prepare(example.kspace[None], example.given), state, control)
    combined = (image - rss(state)).abs().mean()
    loss = Loss(2.0, 3.0, 0.0)
    terminal = example.problem(net, loss)[0].terminal(state, control)
    torch.testing.assert_close(terminal, 2 * misfit + 3 * combined, rtol=1e-5, atol=1e-6)
    first = example.problem(net, Loss(0.0, 0.0, 0.5))[0]
    assert float(first.running(state, None, 1)) == pytest.approx(0.5 * float(misfit), rel=1e-5)
    assert float(first.running(state, None, 2)) == 0


def test_training_lowers_the_error_against_a_truth_it_never_saw(tmp_path):
    slices, full, mask = undersampled(tmp_path)
    net = Network(replace(light(), n_phases=2, gains=4, warm_up=6), seed=1)
    truth = rss(ifft2c(full))

    def error(control):
        scan = net.prepare(torch.stack([one.kspace for one in slices]), mask)
        return float((net.reconstruct(scan, control).image - truth).norm() / truth.norm())

    settings = replace(BASE, steps=30, learning_rate=1.5e-2, warmup=3, self_supervision=SPLIT)
    found = trained(slices, settings, net)
    zero_filled = float((rss(ifft2c(full * mask)) - truth).norm() / truth.norm())
    assert error(found.control) < 0.7 * min(error(net.controls()), zero_filled)


def test_the_mask_of_a_file_without_one_is_where_it_is_not_zero(tmp_path):
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    one = undersampled(tmp_path / "with")[0][0]
    other = undersampled(tmp_path / "without", with_mask=False)[0][0]
    first, second = (draw_split(x, seeded(1), SPLIT) for x in (one, other))
    assert torch.equal(first.held, second.held)
    assert torch.equal(first.kspace, second.kspace)


def test_its_settings_matter_and_it_is_validated_by_the_same_loss(tmp_path):
    slices, _, _ = undersampled(tmp_path)
    settings = replace(BASE, steps=2, self_supervision=SPLIT, validation=Validation(every=1))
    found = trained(slices, settings, validation=slices)
    for change in ({"share": 0.2}, {"centre": 4}, {"width": 1.0}):
        other = replace(settings, self_supervision=replace(SPLIT, **change))
        assert not same(trained(slices, other), found)
    net, generator = network(), seeded(1)
    problems = [draw_split(one, generator, SPLIT).problem(net, Loss()) for one in slices]
    last = trained(slices, replace(settings, steps=1)).control
    costs = [float(bl.adjoint(*p, last).cost) for p in problems]
    assert found.looks[0].cost == pytest.approx(sum(costs) / 2, rel=1e-5)


def test_what_cannot_be_split_is_refused(tmp_path):
    for name in ("full", "few", "dark"):
        (tmp_path / name).mkdir()
    kspace = torch.stack([one.kspace for one in simulated(1)])
    write_volume(tmp_path / "full" / "a.h5", Volume(kspace))
    settings = replace(BASE, self_supervision=SPLIT)
    message = r"a.h5: an undersampled scan was needed .* slice 0 leaves nothing out; train on it"
    with pytest.raises(InputError, match=message):
        trained(SliceDataset(tmp_path / "full"), settings)
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[SIZE // 2 - 4 : SIZE // 2 + 4, SIZE // 2 - 4 : SIZE // 2 + 4] = True
    mask[0, 0] = True
    write_volume(tmp_path / "few" / "a.h5", Volume(kspace * mask, mask=mask))
    message = r"a.h5: at least two sampled positions outside the central 8 x 8 .* the mask has 1"
    with pytest.raises(InputError, match=message):
        trained(SliceDataset(tmp_path / "few"), settings)
    given, mask = mask, SAMPLINGS[1].mask((SIZE, SIZE), seeded(6))
    write_volume(tmp_path / "dark" / "a.h5", Volume(kspace * mask * given, mask=mask))
    with pytest.raises(InputError, match=r"k-space of slice 0 is 0 wherever it was held out"):
        trained(SliceDataset(tmp_path / "dark"), replace(settings, steps=9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, r"share must lie in \(0, 1\), got 0.0; the network needs one part"),
        ({"share": 1.0}, r"share must lie in \(0, 1\), got 1.0"),
        ({"centre": -1}, r"centre must be >= 0 positions, got -1"),
        ({"width": 0.0}, r"width must be > 0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        SelfSupervision(**settings)


def test_calibration_apart_from_the_image_calibrates(tmp_path):
    slices, full, mask = undersampled(tmp_path)
    centre = torch.zeros_like(mask)
    middle = slice(SIZE // 2 - 6, SIZE // 2 + 6)
    centre[middle, middle] = True
    one = slices[0]
    bare = replace(one, kspace=one.kspace * ~centre, mask=mask & ~centre)
    net = Network(replace(light(), n_phases=1, gains=4, warm_up=3))
    with pytest.raises(InputError, match="fully sampled centre"):
        draw_split(bare, seeded(3), SPLIT).problem(net, Loss())
    apart = full[0] * centre / one.unit
    found = draw_split(replace(bare, calibration=apart), seeded(3), SPLIT)
    _, start = found.problem(net, Loss())
    expected = net.prepare(found.kspace[None], found.given, apart[None])
    assert all(map(torch.equal, start, net.observation(expected)))
