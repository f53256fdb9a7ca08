from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

from applications.errors import InputError
from applications.mri.network.architecture import Architecture, narrow, paper
from applications.mri.network.modules import InitialNet, Phase
from applications.mri.network.reconstruction import Network
from applications.mri.physics.operators import fft2c, ifft2c
from applications.mri.physics.products import times

COILS, SHAPE = 2, (12, 10)
OPTIONS = {
    "scale_input": False,
    "start_at_identity": False,
    "self_consistency": 0,
    "demodulate": False,
    "expand_sees_coils": False,
    "rss_skip": False,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_complex(*shape, seed=0):
    return torch.randn(shape, dtype=torch.complex128, generator=seeded(seed))


def small(architecture):
    return replace(architecture, n_phases=2, filters=4, features=3)


def doubled(params):
    return {
        n: p.detach().to(torch.complex128 if p.is_complex() else torch.float64)
        for n, p in params.items()
    }


def shapes(module):
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def test_the_network_of_the_paper_has_four_million_real_parameters():
    control = Network(paper(8)).controls()
    weights = [w for tree in (control.initial, *control.steps) for w in tree.values()]
    assert sum((1 + w.is_complex()) * w.numel() for w in weights) == 4_124_172


def test_the_options_are_off_in_the_paper_and_on_in_light():
    assert paper(5) == Architecture(5, 4, 64, 32, 3, 9, 0.1, **OPTIONS)
    on = {"self_consistency": 16, "step": 1.0}
    assert narrow(5) == Architecture(5, 8, 16, 8, 3, 3, **dict.fromkeys(OPTIONS, True) | on)
    assert {field.name for field in fields(Architecture)} >= set(OPTIONS)


def test_the_layers_of_the_paper_have_its_widths_and_filters():
    c = 8
    widths = [(64, c, 3, 3), (64, 64, 3, 3), (64, 64, 3, 3), (c, 64, 3, 3)]
    assert list(shapes(InitialNet(paper(c), seeded())).values()) == widths
    found = shapes(Phase(paper(c), seeded()))

    def layers(name):
        return [shape for key, shape in found.items() if key.startswith(f"{name}.")]

    assert layers("combine") == [*widths[:3], (1, 64, 3, 3)]
    assert layers("analyse") == [(32, 1, 9, 9), (32, 32, 9, 9), (32, 32, 9, 9)]
    assert layers("synthesise") == [(32, 32, 9, 9), (32, 32, 9, 9), (1, 32, 9, 9)]
    assert layers("expand") == [(64, 1, 3, 3), *widths[1:]]
    assert {key for key in found if "." not in key} == {"step", "threshold"}
    assert not [key for key in found if "bias" in key]


def test_options_widen_only_what_they_say():
    base, c = paper(3), 3
    first = "expand.0.weight"
    plain = shapes(Phase(base, seeded()))
    seeing = shapes(Phase(replace(base, expand_sees_coils=True), seeded()))
    assert seeing == plain | {first: (64, c + 1, 3, 3)}
    consistent = shapes(Phase(replace(base, self_consistency=1), seeded()))
    assert consistent == plain | {"consistency_step": ()}


@pytest.mark.parametrize(("preset", "step"), [(paper, 0.1), (narrow, 1.0)])
def test_steps_and_thresholds_start_where_they_should(preset, step):
    control = Network(small(preset(COILS))).controls()
    for phase in control.steps:
        torch.testing.assert_close(phase["step"], torch.tensor([step, step]))
        assert float(phase["threshold"]) == 0
        if preset is narrow:
            assert float(phase["consistency_step"]) == pytest.approx(0.1)


def test_four_phases_have_weights_of_their_own():
    control = Network(replace(paper(COILS), filters=4, features=3)).controls()
    assert len(control.steps) == 4
    for name, first in control.steps[0].items():
        others = [phase[name] for phase in control.steps[1:]]
        if "." in name:
            assert not any(torch.equal(first, other) for other in others)
        assert not any(first.data_ptr() == other.data_ptr() for other in others)


def test_weights_depend_on_the_seed_alone():
    a = small(paper(COILS))
    name = "combine.0.weight"
    first, again, other = (Network(a, seed).controls().steps[0][name] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def net(params, name, image):
    """Complex convolutions with ReLU on both parts between them, by torch."""
    weights = [p for key, p in params.items() if key.startswith(f"{name}.")]
    for i, weight in enumerate(weights):
        image = F.conv2d(image, weight, padding=weight.shape[-1] // 2)
        if i < len(weights) - 1:
            image = torch.complex(F.relu(image.real), F.relu(image.imag))
    return image


def test_the_initial_network_is_residual_on_kspace_then_an_inverse_transform():
    kspace = random_complex(2, COILS, *SHAPE)
    initial = InitialNet(small(paper(COILS)), seeded())
    params = doubled(dict(initial.named_parameters()))
    found = torch.func.functional_call(initial, params, kspace)
    torch.testing.assert_close(found, ifft2c(kspace + net(params, "net", kspace)))
    # Fresh weights do change k-space.
    assert (found - ifft2c(kspace)).norm() > 0.1 * ifft2c(kspace).norm()


CASES = {
    "paper": small(paper(COILS)),
    "narrow": replace(small(narrow(COILS)), start_at_identity=False),
    "self-consistent": replace(small(paper(COILS)), self_consistency=3),
    "demodulated": replace(small(paper(COILS)), demodulate=True),
    "seeing": replace(small(paper(COILS)), expand_sees_coils=True),
    "wide": replace(small(paper(COILS)), kernel=5, feature_kernel=1),
}


@pytest.mark.parametrize("threshold", [0.0, 0.05])
@pytest.mark.parametrize("architecture", CASES.values(), ids=CASES)
def test_a_phase_is_the_formula(architecture, threshold):
    phase = Phase(architecture, seeded(1))
    params = doubled(dict(phase.named_parameters()))
    params["step"] = torch.tensor([0.3, 0.7], dtype=torch.float64)
    params["threshold"] = torch.tensor(threshold, dtype=torch.float64)
    u, f = random_complex(2, COILS, *SHAPE, seed=2), random_complex(2, COILS, *SHAPE, seed=3)
    mask = torch.rand(2, 1, *SHAPE, generator=seeded(4)) < 0.4
    f = f * mask
    turns = random_complex(2, COILS, *SHAPE, seed=5)
    phases = turns / turns.abs() if architecture.demodulate else None
    normal = None
    if architecture.self_consistency:
        normal = random_complex(2, *SHAPE, COILS, COILS, seed=6)
        params["consistency_step"] = torch.tensor(0.2, dtype=torch.float64)
    found = torch.func.functional_call(phase, params, (u, f, mask, normal, phases))

    residual = ifft2c(mask * (fft2c(u) - f))  # F^H (P F u - f)
    b = u - torch.complex(0.3 * residual.real, 0.7 * residual.imag)
    if normal is not None:
        b = b - 0.2 * torch.stack([times(n, x) for n, x in zip(normal, u, strict=True)])
    seen = b if phases is None else b / phases
    features = net(params, "analyse", net(params, "combine", seen))
    features = torch.polar((features.abs() - threshold).clamp(min=0), features.angle())
    image = net(params, "synthesise", features)
    if architecture.expand_sees_coils:
        image = torch.cat([image, seen], 1)
    correction = net(params, "expand", image)
    expected = b + (correction if phases is None else correction * phases)
    torch.testing.assert_close(found, expected)
    assert (found - b).norm() > 1e-4 * b.norm()  # far above the tolerance


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_coils": 0}, "n_coils must be at least 1, got 0"),
        ({"n_phases": 0}, "n_phases must be at least 1, got 0"),
        ({"filters": -1}, "filters must be at least 1, got -1"),
        ({"features": 0}, "features must be at least 1, got 0"),
        ({"kernel": 4}, "kernel must be odd, got 4"),
        ({"feature_kernel": 2}, "feature_kernel must be odd, got 2"),
        ({"self_consistency": -1}, "self_consistency must be >= 0, got -1"),
    ],
)
def test_sizes_that_make_no_network_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Architecture(**settings)
