import json
from dataclasses import dataclass, replace

import pytest
import torch

from applications.errors import InputError
from applications.mri.data import SliceDataset, Volume, fully_sampled, write_volume
from applications.mri.evaluation.baselines import (
    Sweep,
    calibration_width,
    espirit_maps,
    l1_wavelet,
    sense,
    sparse_spirit,
    zero_filled,
)
from applications.mri.evaluation.methods import (
    classical_methods,
    network_methods,
    sweep_regularisation,
)
from applications.mri.evaluation.metrics import Convention, Scores, score
from applications.mri.evaluation.scoring import Evaluation, VolumeScores, evaluate, table_rows
from applications.mri.network.architecture import narrow, paper
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained
from applications.mri.physics.masks import acceleration_of
from applications.mri.physics.operators import centre_crop, ifft2c, rss
from applications.mri.sampling import CartesianRandom, Sampling
from applications.mri.simulation.simulate import simulate

COILS, SIZE = 2, 24
SAMPLING = CartesianRandom(2, 0.3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    axis = (torch.arange(SIZE) - SIZE // 2) / (SIZE / 2)
    disc = ((axis[:, None] ** 2 + axis[None, :] ** 2) < 0.6).float() * 0.8
    disc[8:12, 6:14] = 0.3
    generator = seeded()
    for name, crop in (("a", 0), ("b", 3)):
        kspace = torch.stack([simulate(disc, COILS, generator).kspace for _ in range(2)])
        reference = rss(ifft2c(kspace))[:, crop : SIZE - crop, crop : SIZE - crop]
        write_volume(folder / f"{name}.h5", Volume(kspace, reference))
    return SliceDataset(folder)


def trained(preset, n_coils=COILS):
    network = Network(replace(preset(n_coils), n_phases=2, filters=3, features=2), 1)
    return Trained(network, network.controls(), {})


def test_scores_are_those_of_the_metrics_on_the_same_masks(scans):
    methods = {"zero": lambda k, m: zero_filled(k), "half": lambda k, m: 0.5 * zero_filled(k)}
    told = []
    found = evaluate(methods, scans, SAMPLING, 5, lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]
    generator = seeded(5)
    for volume, file in zip(found.volumes, scans.files, strict=True):
        mask = SAMPLING.mask(file.shape, generator)  # one a volume
        assert (volume.name, volume.acceleration) == (file.path.stem, acceleration_of(mask))
        pairs = [fully_sampled(file.read_slice(k)) for k in range(2)]
        references = torch.stack([reference for _, reference in pairs])
        images = torch.stack([zero_filled(kspace * mask) for kspace, _ in pairs])
        images = centre_crop(images, references.shape[-2:])
        assert list(volume.scores) == ["zero", "half"]
        assert volume.scores["zero"] == score(references, images)
        assert volume.scores["half"] == score(references, 0.5 * images)
    for name in methods:
        values = [volume.scores[name] for volume in found.volumes]
        for field in ("psnr", "ssim", "nmse"):
            expected = sum(getattr(v, field) for v in values) / 2
            assert getattr(found.mean[name], field) == pytest.approx(expected, rel=1e-12)
    assert all(seconds > 0 for seconds in found.seconds.values())


def test_scores_are_taken_by_the_convention_asked_for(scans):
    methods = {"zero": lambda k, m: zero_filled(k)}
    found = evaluate(methods, scans, SAMPLING, 5, convention=Convention.SLICE)
    assert found.convention == found.as_json()["convention"] == "slice"
    kspace = [fully_sampled(scans.files[0].read_slice(k)) for k in range(2)]
    mask = SAMPLING.mask(scans.files[0].shape, seeded(5))
    references = torch.stack([reference for _, reference in kspace])
    images = torch.stack([zero_filled(one * mask) for one, _ in kspace])
    expected = score(references, images, Convention.SLICE)
    assert found.volumes[0].scores["zero"] == expected != score(references, images)


def test_every_method_gets_the_same_undersampled_data(scans):
    seen = {"one": [], "two": []}

    def method(name):
        def run(kspace, mask):
            seen[name].append((kspace, mask))
            return zero_filled(kspace)

        return run

    evaluate({name: method(name) for name in seen}, scans, SAMPLING, 0)
    for (kspace, mask), (other, other_mask) in zip(*seen.values(), strict=True):
        assert torch.equal(kspace, other)
        assert torch.equal(mask, other_mask)
        assert not kspace[:, ~mask].any()
    masks = [mask for _, mask in seen["one"]]
    assert torch.equal(masks[0], masks[1])  # a volume keeps its mask
    assert not torch.equal(masks[1], masks[2])


def test_masks_depend_on_the_seed(scans):
    methods = {"zero": lambda k, m: zero_filled(k)}
    first, again, other = (evaluate(methods, scans, SAMPLING, seed).mean for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_the_time_is_that_of_the_method_alone_a_slice(scans, monkeypatch):
    clock = iter(range(1000))
    timer = "applications.mri.evaluation.scoring.time.perf_counter"
    monkeypatch.setattr(timer, lambda: next(clock))
    found = evaluate({"zero": lambda k, m: zero_filled(k)}, scans, SAMPLING, 0)
    assert found.seconds == {"zero": 1.0}


def test_undersampled_scans_are_refused(tmp_path):
    mask = SAMPLING.mask((SIZE, SIZE), seeded())
    kspace = torch.ones(1, COILS, SIZE, SIZE, dtype=torch.complex64) * mask
    write_volume(tmp_path / "a.h5", Volume(kspace, mask=mask))
    with pytest.raises(InputError, match=r"a.h5: fully sampled k-space was needed"):
        evaluate({"zero": lambda k, m: zero_filled(k)}, SliceDataset(tmp_path), SAMPLING, 0)


def test_what_a_method_cannot_use_is_refused_with_the_name_of_the_file(scans):
    methods = network_methods(trained(narrow))
    with pytest.raises(InputError, match=r"a.h5: a fully sampled centre of 5 x 5 positions was"):
        evaluate(methods, scans, CartesianRandom(2, 0.1), 0)


@pytest.mark.parametrize("n_coils", [1, 3])
def test_scans_of_another_coil_count_get_that_of_the_network(scans, n_coils):
    kspace, mask = scans[0].kspace, SAMPLING.mask((SIZE, SIZE), seeded())
    network = trained(narrow, n_coils)
    fitted = kspace * mask
    if n_coils == 3:
        fitted = torch.cat([fitted, torch.zeros_like(fitted[:1])])
    else:
        vectors = torch.linalg.svd(fitted.reshape(COILS, -1), full_matrices=False).U[:, :1]
        # the phase of a singular vector is free; the network sees that it is fixed here
        vectors = vectors * vectors[vectors.abs().argmax()].sgn().conj()
        fitted = torch.einsum("cn,cyx->nyx", vectors.conj(), fitted)
    found = network_methods(network)["ours"](kspace * mask, mask)
    scan = network.network.prepare(fitted[None], mask)
    expected = network.network.reconstruct(scan, network.control).image[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("preset", [paper, narrow])
def test_the_network_is_ours_and_its_start_is_shown_where_it_is_filled(scans, preset):
    one = trained(preset)
    methods = network_methods(one)
    mask = SAMPLING.mask((SIZE, SIZE), seeded())
    kspace = scans[0].kspace * mask
    scan = one.network.prepare(kspace[None], mask)
    expected = one.network.reconstruct(scan, one.control).image[0]
    torch.testing.assert_close(methods["ours"](kspace, mask), expected)
    if preset is paper:
        assert list(methods) == ["ours"]
        return
    assert list(methods) == ["self-consistent start", "ours"]
    start = methods["self-consistent start"](kspace, mask)
    torch.testing.assert_close(start, rss(ifft2c(scan.start))[0] * scan.scale[0, 0])


def test_classical_methods_use_the_maps_of_each_slice_and_the_tuned_values(scans):
    swept = {"CG-SENSE": Sweep(0.05, (0.05,), (1.0,)), "l1-wavelet": Sweep(0.02, (0.02,), (1.0,))}
    methods = classical_methods(swept)
    assert list(methods) == ["zero-filled", "CG-SENSE", "l1-wavelet"]
    assert list(classical_methods({})) == ["zero-filled"]
    mask = SAMPLING.mask((SIZE, SIZE), seeded())
    for index in (0, 1):
        kspace = scans[index].kspace * mask
        maps = espirit_maps(kspace, calibration_width(mask))
        found = {name: method(kspace, mask) for name, method in methods.items()}
        torch.testing.assert_close(found["zero-filled"], zero_filled(kspace))
        torch.testing.assert_close(found["CG-SENSE"], sense(kspace, mask, maps, 0.05))
        torch.testing.assert_close(found["l1-wavelet"], l1_wavelet(kspace, mask, maps, 0.02))


@dataclass(frozen=True)
class Noted(Sampling):
    """Notes its masks."""

    masks: list

    def mask(self, shape, generator):
        self.masks.append(SAMPLING.mask(shape, generator))
        return self.masks[-1]


def test_the_sweep_takes_the_value_of_highest_psnr_on_the_middle_slices(scans, monkeypatch):
    monkeypatch.setattr("applications.mri.evaluation.methods.bart_installed", lambda: False)
    masks = []
    whole = SliceDataset([scans.files[0].path])
    found = sweep_regularisation(whole, Noted(masks), 3)
    assert torch.equal(masks[0], SAMPLING.mask((SIZE, SIZE), seeded(3)))
    kspace, reference = fully_sampled(whole[1])
    kspace = kspace * masks[0]
    maps = espirit_maps(kspace, calibration_width(masks[0]))
    methods = {"CG-SENSE": sense, "l1-wavelet": l1_wavelet, "l1-SPIRiT": sparse_spirit}
    assert list(found) == list(methods)
    for name, method in methods.items():
        sweep = found[name]
        psnrs = [
            score(reference[None], method(kspace, masks[0], maps, lamda)[None]).psnr
            for lamda in sweep.lamdas
        ]
        assert sweep.psnrs == pytest.approx(psnrs, abs=1e-3)
        assert sweep.lamda == sweep.lamdas[psnrs.index(max(psnrs))]
        assert len(sweep.lamdas) == 3


def evaluation():
    volumes = [
        VolumeScores("v", 4.0, {"zero": Scores(20.0, 0.5, 0.1), "ours": Scores(30.0, 0.9, 0.01)}),
        VolumeScores("w", 5.0, {"zero": Scores(24.0, 0.7, 0.3), "ours": Scores(31.0, 0.95, 0.03)}),
    ]
    return Evaluation(volumes, {"zero": 0.012, "ours": 1.0})


def test_rows_of_the_table_are_means_and_gains_over_the_first_method():
    assert list(table_rows(evaluation())) == [
        ("zero", "22.00", "+0.00", "-", "0.600", "0.2000", "0.01"),
        ("ours", "30.50", "+8.50", "-", "0.925", "0.0200", "1.00"),
    ]


def test_an_evaluation_is_plain_values():
    found = json.loads(json.dumps(evaluation().as_json()))
    by = {"convention": "fastmri", "object_psnr": None}
    assert found["convention"] == "fastmri"
    assert found["mean"]["ours"] == {"psnr": 30.5, "ssim": pytest.approx(0.925), "nmse": 0.02} | by
    assert found["volumes"][1] == {
        "name": "w",
        "acceleration": 5.0,
        "scores": {
            "zero": {"psnr": 24.0, "ssim": 0.7, "nmse": 0.3} | by,
            "ours": {"psnr": 31.0, "ssim": 0.95, "nmse": 0.03} | by,
        },
    }
    assert found["seconds_per_slice"] == {"zero": 0.012, "ours": 1.0}
