import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from command_lines import call, refused, succeed
from scan_files import as_bart, header, lines_of, write_cfl, write_ismrmrd

from applications.mri.bundled.paths import bundled_scan_path
from applications.mri.commands.demo_figure import swept_multipliers
from applications.mri.data import SliceDataset, Volume, VolumeFile, implied_mask, write_volume
from applications.mri.evaluation.methods import (
    L1_SPIRIT,
    classical_methods,
    network_methods,
    sweep_regularisation,
)
from applications.mri.evaluation.metrics import Convention, score
from applications.mri.evaluation.scoring import evaluate
from applications.mri.network.architecture import light, narrow, paper, preset_named
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained, load_weights, pretrained, save_weights
from applications.mri.physics.l1_spirit import l1_spirit
from applications.mri.physics.masks import acceleration_of
from applications.mri.physics.operators import fft2c, ifft2c, rss
from applications.mri.sampling import (
    CartesianEquispaced,
    CartesianMagic,
    CartesianRandom,
    GaussianColumns,
    GaussianPoints,
    PoissonDisc,
    Radial,
)
from applications.mri.simulation.anatomy import load_anatomies
from applications.mri.training.settings import TrainingSettings
from applications.mri.training.training import train
from bilevel import tree

ROOT = Path(__file__).parents[3]
COILS, SIZE = 2, 24
SAMPLING = CartesianRandom(2.0, 0.25)
MASK = ("--acceleration", 2, "--center", 0.25)
SAMPLING_OPTIONS = [
    *("--mask", "--acceleration", "--center", "--calibration", "--width", "--spokes"),
]
RESUMABLE = ["w.safetensors", "w.safetensors.state"]
COMMANDS = {
    "demo": ["--out", "--seconds", "--size", "--seed", "--threads"],
    "simulate": [
        *("--out", "--size", "--coils", "--noise", "--repeats", "--anatomies", "--plane"),
        *("--seed", "--local-phase", "--reference", "--wrap"),
    ],
    "train": [
        *("--data", "--out", "--preset", "--init", *SAMPLING_OPTIONS, "--steps", "--seconds"),
        *("--self-supervised", "--learning-rate", "--schedule", "--accumulate", "--crop"),
        *(
            "--whole",
            "--loss",
            "--coils",
            "--tasks",
            "--task",
            "--validation",
            "--validate-every",
            "--patience",
            "--budget",
            "--device",
        ),
        *("--precision", "--tensorboard", "--resume", "--seed", "--threads"),
    ],
    "evaluate": [
        *("--data", "--weights", "--out", "--baselines", *SAMPLING_OPTIONS, "--metrics"),
        *("--images", "--device", "--seed", "--threads"),
    ],
    "meta-train": [
        *("--tasks", "--task", "--out", "--ablations", "--preset", "--coils", "--init"),
        *("--seconds", "--evaluations", "--method", "--optimizer", "--inner-steps"),
        *("--learning-rate", "--outer-rate", "--batch", "--crop", "--entropy", "--floor"),
        *("--learn-share", "--penalty", "--adapt-steps", "--adapt-slices", "--seeds", "--seed"),
        *("--outer-clip", "--penalty-rate", "--device", "--threads", "--keep-graphs", "--resume"),
    ],
    "transfer": [
        *("--tasks", "--task", "--unseen", "--meta", "--out", "--preset", "--coils", "--seconds"),
        *("--init", "--evaluations", "--optimizer", "--learning-rate", "--batch", "--crop"),
        *("--steps", "--slices", "--seed", "--device", "--threads", "--keep-graphs", "--resume"),
    ],
    "reconstruct": [
        *("--scan", "--method", "--weights", "--out", "--png", "--mask", "--suffix", "--skip-bad"),
        *("--check", "--no-check", "--fallback", "--no-fallback", "--adapt", "--json"),
        *("--device", "--threads"),
    ],
}


def squeezed(text):
    return " ".join(text.split())


def numbers(scores):
    return {name: getattr(scores, name) for name in ("psnr", "ssim", "nmse", "object_psnr")}


def everything_in(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def anatomies(tmp_path_factory):
    path = tmp_path_factory.mktemp("anatomies") / "own.h5"
    with h5py.File(path, "w") as file:
        images = load_anatomies()["brain_t1_axial"][4:13, 64:192, 64:192] * 255
        file["head/images"] = images.numpy().round().astype(np.uint8)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory, anatomies):
    folder = tmp_path_factory.mktemp("data")
    settings = ["--size", SIZE, "--coils", COILS, "--noise", 0.001, "--anatomies", anatomies]
    text = succeed("simulate", "--out", folder, *settings, "--repeats", 2)
    assert re.findall(r"(\w+): (\d) files", text) == [
        ("train", "2"),
        ("validation", "1"),
        ("test", "1"),
    ]
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    network = Network(replace(narrow(COILS), n_phases=2, filters=3, features=2), 1)
    save_weights(path, Trained(network, network.controls(), {}))
    return path


@pytest.fixture(scope="module")
def scan(tmp_path_factory, data):
    """Undersampled, with its mask."""
    path = tmp_path_factory.mktemp("scan") / "scan.h5"
    kspace = torch.stack([s.kspace for s in SliceDataset(data / "train")])[:2]
    mask = SAMPLING.mask((SIZE, SIZE), torch.Generator().manual_seed(1))
    write_volume(path, Volume(kspace * mask, mask=mask[0]))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(command):
    text = succeed(command, "--help")
    followed = [] if command == "demo" else ["--follow-links"]
    assert sorted(set(re.findall(r"--[a-z][a-z-]*", text))) == sorted(
        [*COMMANDS[command], *followed, "--help"]
    )


def test_help_names_every_command():
    text = succeed("--help")
    assert all(command in text for command in COMMANDS)


def test_simulated_scans_are_fully_sampled_and_of_the_size_asked_for(data):
    for role, n_files in (("train", 2), ("validation", 1), ("test", 1)):
        files = SliceDataset(data / role).files
        assert len(files) == n_files
        for file in files:
            assert (file.shape, file.n_coils) == ((SIZE, SIZE), COILS)
            assert implied_mask(file.read_slice(0).kspace).all()


@pytest.mark.parametrize("preset", [light, paper])
def test_training_writes_the_weights_that_the_settings_lead_to(data, tmp_path, preset):
    out = tmp_path / "new" / "w.safetensors"
    asked = None if preset is light else COILS
    settings = ["--steps", 2, "--crop", 8, "--seed", 3, "--learning-rate", 0.001]
    text = succeed(
        "train",
        "--data",
        data / "train",
        "--out",
        out,
        "--preset",
        preset.__name__,
        *MASK,
        *settings,
    )
    assert "2 updates" in text
    assert [path.name for path in out.parent.iterdir()] == ["w.safetensors"]
    found = load_weights(out)
    assert found.network.architecture == preset_named(preset.__name__, asked)
    assert found.record["steps"] == 2
    assert found.record["samplings"] == repr((SAMPLING,))
    network = Network(found.network.architecture, 3)
    expected = train(
        network,
        network.controls(),
        SliceDataset(data / "train"),
        TrainingSettings(
            (SAMPLING,),
            steps=2,
            learning_rate=0.001,
            crop=8,
            seed=3,
        ),
    )
    for new, old in zip(
        tree.leaves_of(found.control), tree.leaves_of(expected.control), strict=True
    ):
        assert new is old is None or torch.equal(new, old)


@pytest.mark.parametrize(
    ("mask", "sampling"),
    [
        ("random --acceleration 2.5 --center 0.25", CartesianRandom(2.5, 0.25)),
        ("equispaced --acceleration 2.5 --center 0.25", CartesianEquispaced(2.5, 0.25)),
        ("equispaced", CartesianEquispaced()),
        ("poisson --acceleration 2.5", PoissonDisc(2.5)),
        ("poisson", PoissonDisc()),
        ("poisson --calibration 12", PoissonDisc(calibration=12)),
        ("magic --acceleration 3", CartesianMagic(3.0)),
        ("gaussian --width 0.2", GaussianColumns(width=0.2)),
        ("gaussian-2d --calibration 4 --width 0.2", GaussianPoints(8.0, 4, 0.2)),
        ("radial --spokes 16", Radial(16)),
    ],
)
def test_training_goes_on_from_given_weights_with_any_mask(
    data, weights, tmp_path, monkeypatch, mask, sampling
):
    seen = {}

    def probe(network, control, slices, settings, *others):
        seen.update(network=network, control=control, settings=settings)
        return train(network, control, slices, replace(settings, samplings=(SAMPLING,)), *others)

    monkeypatch.setattr("applications.mri.commands.train.train", probe)
    options = ["--init", weights, "--mask", *mask.split()]
    succeed("train", "--data", data / "train", "--out", tmp_path / "w", *options, "--steps", 1)
    begun = load_weights(weights)
    assert seen["settings"].samplings == (sampling,)
    assert seen["network"].architecture == begun.network.architecture
    for new, old in zip(
        tree.leaves_of(seen["control"]), tree.leaves_of(begun.control), strict=True
    ):
        assert new is old is None or torch.equal(new, old)


def test_evaluation_writes_the_scores_of_every_method(data, weights, tmp_path, monkeypatch):
    tuned = []

    def noting(slices, sampling, seed):
        swept = sweep_regularisation(slices, sampling, seed)
        tuned.append(([file.path for file in slices.files], sampling, seed, swept))
        return swept

    monkeypatch.setattr("applications.mri.commands.scans.sweep_regularisation", noting)
    out = tmp_path / "new" / "scores.json"
    folders = ["--data", data / "test", "--baselines", data / "validation"]
    text = succeed("evaluate", *folders, "--weights", weights, "--out", out, *MASK, "--seed", 4)
    found = json.loads(out.read_text())
    assert (found["seed"], found["sampling"]) == (4, repr(SAMPLING))
    ((*asked, swept),) = tuned
    assert asked == [[*(data / "validation").glob("*.h5")], SAMPLING, 5]
    methods = classical_methods(swept) | network_methods(load_weights(weights))
    expected = evaluate(methods, SliceDataset(data / "test"), SAMPLING, 4)
    assert list(found["mean"]) == list(expected.mean)
    assert found["convention"] == "fastmri"
    assert "Metrics: fastmri" in text
    for name, scores in expected.mean.items():
        assert found["mean"][name].pop("convention") == "fastmri"
        assert found["mean"][name] == pytest.approx(numbers(scores), rel=1e-4)
        assert name in text
        assert f"{scores.psnr:.2f}" in text
    assert [path.name for path in out.parent.iterdir()] == ["scores.json"]


def test_evaluation_without_validation_scans_leaves_out_what_must_be_tuned(data, weights, tmp_path):
    out = tmp_path / "scores.json"
    succeed("evaluate", "--data", data / "test", "--weights", weights, "--out", out, *MASK)
    methods = ["zero-filled", "self-consistent start", "ours"]
    assert list(json.loads(out.read_text())["mean"]) == methods


@pytest.mark.parametrize("with_mask", [True, False])
def test_a_reconstruction_is_that_of_the_network(scan, weights, tmp_path, with_mask):
    source, out, png = scan, tmp_path / "new" / "image.h5", tmp_path / "pictures" / "image.png"
    if not with_mask:
        source = tmp_path / "bare.h5"
        kspace = torch.stack([s.kspace for s in SliceDataset([scan])])
        write_volume(source, Volume(kspace))
    succeed("reconstruct", "--scan", source, "--weights", weights, "--out", out, "--png", png)
    trained = load_weights(weights)
    with h5py.File(out) as file:
        found = torch.from_numpy(file["reconstruction"][()])
        assert (file.attrs["source"], file.attrs["weights"]) == (source.name, weights.name)
    for one, image in zip(SliceDataset([scan]), found, strict=True):
        prepared = trained.network.prepare(one.kspace[None], one.mask)
        expected = trained.network.reconstruct(prepared, trained.control).image[0]
        torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-6)
    from matplotlib.image import imread

    shown = found[1].numpy()
    gray = np.clip(shown / np.quantile(shown, 0.998), 0, 1)
    assert np.abs(imread(png)[..., 0] - gray).max() <= 2 / 255  # 256 levels, rounded twice
    assert [path.name for path in out.parent.iterdir()] == ["image.h5"]


@pytest.fixture(scope="module")
def formats(tmp_path_factory, scan):
    """The scan in every format: twice oversampled in ISMRMRD, two repetitions in M4Raw."""
    folder = tmp_path_factory.mktemp("formats")
    one = SliceDataset([scan])
    kspace, mask = torch.stack([s.kspace for s in one]), one[0].mask
    for k in (1, 2):
        write_volume(folder / f"s_T2{k:02}.h5", Volume(k * kspace))
    write_cfl(folder / "bart", as_bart(kspace))
    wide = torch.zeros(*kspace.shape[:2], 2 * SIZE, SIZE, dtype=torch.complex64)
    wide[:, :, SIZE // 2 : -SIZE // 2] = ifft2c(kspace)
    lines = [
        line
        for k, raw in enumerate(fft2c(wide))
        for line in lines_of(raw, mask[0].nonzero().flatten(), slice=k, position=(1, 2, 4 * k))
    ]
    write_ismrmrd(folder / "raw.mrd", lines, header((2 * SIZE, SIZE)))
    return folder


def reconstructed(path):
    with h5py.File(path) as file:
        return file["reconstruction"][()]


@pytest.fixture(scope="module")
def usual(tmp_path_factory, scan, weights):
    """What is said of the scan, and its images."""
    out = tmp_path_factory.mktemp("usual") / "image.h5"
    text = succeed("reconstruct", "--scan", scan, "--weights", weights, "--out", out)
    return text, reconstructed(out)


@pytest.mark.parametrize("name", ["s_T201.h5", "s_T2", "bart", "bart.cfl", "raw.mrd"])
def test_a_scan_is_reconstructed_the_same_in_every_format(
    formats, scan, usual, weights, tmp_path, name
):
    def run(source, out):
        return succeed("reconstruct", "--scan", source, "--weights", weights, "--out", out)

    said, expected = usual
    acceleration = acceleration_of(VolumeFile(scan).read_slice(0).mask)
    assert f"Acceleration {acceleration:.2f}" in said
    run(formats / name, tmp_path / "image.h5")
    found = reconstructed(tmp_path / "image.h5")
    if name == "s_T2":  # the second repetition is twice the first, and the network scales its input
        assert found.shape == (2, 2, SIZE, SIZE)
        np.testing.assert_allclose(found[1], 2 * expected, rtol=1e-3, atol=1e-4)
        found = found[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    text = run(formats / name, tmp_path / "image.nii.gz")
    image = nibabel.load(tmp_path / "image.nii.gz")
    axes = (1, 2, 0) if name != "s_T2" else (2, 3, 1, 0)
    values = reconstructed(tmp_path / "image.h5").transpose(axes)
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), values)
    oriented = name == "raw.mrd"
    assert ("no orientation" in text) == (not oriented)
    if oriented:
        assert image.affine @ (SIZE // 2, SIZE // 2, 1, 1) == pytest.approx((-1, -2, 4, 1))


def test_l1_spirit_is_a_method_of_its_own_and_kept_in_the_record(scan, tmp_path):
    options = ["--scan", scan, "--out", tmp_path / "i.h5", "--method", "l1-spirit"]
    succeed("reconstruct", *options)
    with h5py.File(tmp_path / "i.h5") as file:
        images = torch.from_numpy(file["reconstruction"][()])
        assert file.attrs["method"] == "l1-spirit"
    for i, image in enumerate(images):
        one = VolumeFile(scan).read_slice(i)
        torch.testing.assert_close(image, rss(l1_spirit(one.kspace, one.mask)))


def test_the_preset_light_takes_any_number_of_coils_and_none_named(data, tmp_path):
    options = ["--data", data / "train", "--out", tmp_path / "w", *MASK]
    assert "any number of coils" in refused("train", *options, "--coils", 4)
    shutil.copytree(data / "train", tmp_path / "mixed")
    kspace = torch.randn(1, 3, SIZE, SIZE, dtype=torch.complex64, generator=torch.Generator())
    write_volume(tmp_path / "mixed" / "three.h5", Volume(kspace))
    options = ["--data", tmp_path / "mixed", "--out", tmp_path / "w", *MASK, "--steps", 2]
    assert "Coils" not in succeed("train", *options)


@pytest.mark.parametrize("text", ["1,1", "1,1,x", "1,-1,0", "1,1,inf"])
def test_weights_of_the_loss_are_three_numbers(data, tmp_path, text):
    options = ["--data", data / "train", "--out", tmp_path / "w", *MASK, "--loss", text]
    assert "three numbers >= 0, such as 1,1,0.01" in refused("train", *options)


def test_phase_oversampling_is_cropped_off_the_images(formats, weights, scan, tmp_path):
    one = VolumeFile(formats / "raw.mrd")
    lines = lines_of(one.read_slice(0).kspace)
    views = {"shown_x": SIZE, "shown_x_mm": 2 * SIZE, "shown_y": SIZE - 6}
    xml = header((SIZE, SIZE), **views, shown_y_mm=1.5 * (SIZE - 6))
    write_ismrmrd(tmp_path / "wide.h5", lines, xml)
    for source in (scan, tmp_path / "wide.h5"):
        out = tmp_path / f"{source.stem}_image.h5"
        mask = tmp_path / "mask.npy"
        np.save(mask, VolumeFile(scan).read_slice(0).mask[0].numpy())
        options = ["--weights", weights, "--mask", mask, "--out", out]
        succeed("reconstruct", "--scan", source, *options)
    whole, shown = (reconstructed(tmp_path / f"{n}_image.h5")[0] for n in ("scan", "wide"))
    assert shown.shape == (SIZE, SIZE - 6)
    np.testing.assert_allclose(shown, whole[:, 3:-3], rtol=1e-3, atol=1e-4)


def test_a_mask_from_a_file_replaces_that_of_the_scan(data, scan, weights, tmp_path):
    full = next((data / "test").iterdir())
    mask = VolumeFile(scan).read_slice(0).mask
    np.savez(tmp_path / "mask.npz", mask=mask)
    out = tmp_path / "image.h5"
    options = ["--weights", weights, "--out", out, "--no-check", "--mask"]
    text = succeed("reconstruct", "--scan", full, *options, tmp_path / "mask.npz")
    assert f"Acceleration {mask.numel() / int(mask.sum()):.2f}" in text
    trained, one = load_weights(weights), VolumeFile(full).read_slice(0)
    prepared = trained.network.prepare((one.kspace * mask)[None], mask)
    expected = trained.network.reconstruct(prepared, trained.control).image[0]
    np.testing.assert_allclose(reconstructed(out)[0], expected, rtol=1e-5, atol=1e-6)
    before = everything_in(tmp_path)
    np.save(tmp_path / "full.npy", np.ones(SIZE))
    found = refused("reconstruct", "--scan", scan, *options, tmp_path / "full.npy")
    assert re.search(r"scan.h5: the mask must lie within what was measured, \d+ of its 576", found)
    np.save(tmp_path / "wide.npy", np.ones(SIZE + 1))
    found = refused("reconstruct", "--scan", scan, *options, tmp_path / "wide.npy")
    assert re.search(r"scan.h5: .*wide.npy: mask must have shape \(24, 24\), got \(25,\)", found)
    found = refused("reconstruct", "--scan", scan, *options, tmp_path / "none.npy")
    assert "none.npy: a mask file was needed, there is no such file" in found
    assert {k: v for k, v in everything_in(tmp_path).items() if k in before} == before


def test_evaluation_takes_masks_from_files_and_names_its_convention(data, weights, tmp_path):
    test = data / "test"
    mask = SAMPLING.mask((SIZE, SIZE), torch.Generator().manual_seed(7))
    np.save(tmp_path / "mask.npy", mask)
    out = tmp_path / "scores.json"
    options = ["--data", test, "--weights", weights, "--out", out, "--mask", tmp_path / "mask.npy"]
    text = succeed("evaluate", *options, "--metrics", "slice")
    assert "Metrics: slice" in text
    found = json.loads(out.read_text())
    assert found["convention"] == found["mean"]["ours"]["convention"] == "slice"
    assert found["volumes"][0]["acceleration"] == pytest.approx(mask.numel() / int(mask.sum()))
    one = SliceDataset(test)[0]
    images = rss(ifft2c(one.kspace * mask))[None]
    expected = score(one.reference[None], images, Convention.SLICE)
    if len(SliceDataset(test)) == 1:
        assert found["mean"]["zero-filled"]["psnr"] == pytest.approx(expected.psnr, rel=1e-6)


def test_a_perfect_score_is_null_in_valid_json(data, weights, tmp_path):
    """Without a stored reference that of full k-space is taken, which zero filling then equals."""
    (tmp_path / "data").mkdir()
    kspace = torch.stack([s.kspace for s in SliceDataset(data / "test")])
    write_volume(tmp_path / "data" / "a.h5", Volume(kspace))
    np.save(tmp_path / "full.npy", np.ones(SIZE))
    out = tmp_path / "scores.json"
    paths = ["--data", tmp_path / "data", "--weights", weights, "--out", out]
    succeed("evaluate", *paths, "--mask", tmp_path / "full.npy")
    assert "Infinity" not in out.read_text()
    found = json.loads(out.read_text())["mean"]["zero-filled"]
    assert (found["psnr"], found["nmse"]) == (None, 0.0)


def test_scans_are_simulated_from_nifti(tmp_path):
    axis = np.linspace(-1, 1, 20)
    ball = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    nibabel.save(nibabel.Nifti1Image((ball < 0.9) * (2 - ball), np.eye(4)), tmp_path / "head.nii")
    options = ["--anatomies", tmp_path / "head.nii", "--size", 16, "--coils", 2]
    text = succeed("simulate", "--out", tmp_path / "out", *options, "--plane", "sagittal")
    assert "test: 1 files" in text
    file = VolumeFile(tmp_path / "out" / "train" / "head.h5")
    assert (file.shape, file.n_coils, file.acquisition) == ((16, 16), 2, "head")
    found = refused("simulate", "--out", tmp_path / "out", "--plane", "axial", "--size", 16)
    assert "a plane can be chosen for NIfTI only" in found


@pytest.mark.slow  # the demo itself is one of the checks of a commit
@pytest.mark.parametrize("trains", [True, False])
def test_the_demo_leaves_figure_and_results_and_weights_of_its_own(tmp_path, monkeypatch, trains):
    few = {"brain_t1_axial": load_anatomies()["brain_t1_axial"][4:13]}
    loading = "applications.mri.simulation.phantoms.load_anatomies"
    monkeypatch.setattr(loading, lambda path, plane: few)
    # The centre of the measured scan, and one value of each regularisation, for the sake of time.
    measured = VolumeFile(bundled_scan_path()).read_slice(0).kspace[:, 48:112, 48:112]
    write_volume(tmp_path / "phantom.h5", Volume(measured[None]))
    bundled = "applications.mri.commands.demo.bundled_scan_path"
    monkeypatch.setattr(bundled, lambda: tmp_path / "phantom.h5")
    values = {"CG-SENSE": (0.01,), "l1-wavelet": (0.01,), L1_SPIRIT: (0.002,)}
    monkeypatch.setattr("applications.mri.evaluation.methods.bart_installed", lambda: False)
    monkeypatch.setattr("applications.mri.evaluation.methods._LAMDAS", values)
    maps = "applications.mri.evaluation.methods.espirit_maps"  # tested with the baselines
    monkeypatch.setattr(maps, lambda kspace, _: ifft2c(kspace) / rss(ifft2c(kspace)))
    training = ("--seconds", 1) if trains else ()
    text = succeed("demo", "--out", tmp_path / "demo", "--size", 64, "--seed", 2, *training)
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    left = {"data", "figure.png", "results.json"}
    assert names == (left | {"weights.safetensors"} if trains else left)
    assert all(name in text.replace("\n", "") for name in ("figure.png", "results.json"))
    assert (tmp_path / "demo" / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["settings"]["size"] == 64
    assert results["settings"]["seed"] == 2
    if trains:
        assert results["training"]["updates"] == len(results["training"]["costs"]) >= 1
        trained = load_weights(tmp_path / "demo" / "weights.safetensors")
        assert trained.network.architecture == light()
    else:
        assert results["training"] == {"weights": "pretrained"}
        trained = pretrained()
    test = SliceDataset(tmp_path / "demo" / "data" / "test")
    sampling = CartesianRandom(4.0, 0.08)
    expected = evaluate(network_methods(trained), test, sampling, 2 + 2).mean
    found = results["evaluation"]["mean"]
    assert list(found) == ["zero-filled", "CG-SENSE", "l1-wavelet", L1_SPIRIT, *expected]
    for name, scores in expected.items():
        assert found[name].pop("convention") == "fastmri"
        assert found[name] == pytest.approx(numbers(scores), rel=1e-3)
    phantom = SliceDataset([tmp_path / "phantom.h5"])
    twice = CartesianRandom(2.0, 0.16)
    for name, scores in evaluate(network_methods(trained), phantom, twice, 2 + 2).mean.items():
        assert results["measured"]["mean"][name]["psnr"] == pytest.approx(scores.psnr, rel=1e-3)
    checks = results["checks"]
    assert list(checks) == [file.path.stem for file in test.files]
    assert all(one["held_out_samples"] > 0 for one in checks.values())
    mask = sampling.mask((64, 64), torch.Generator().manual_seed(4))
    multipliers = swept_multipliers(trained, test.files[0], 0, mask)
    assert [m.shape for m in multipliers] == [(64, 64)] * 9
    assert all(float(m.max()) > 0 for m in multipliers)


def write_raw(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value


def good(n_coils=COILS):
    return (
        np.random.default_rng(0)
        .normal(size=(1, n_coils, SIZE, SIZE, 2))
        .view(complex)[..., 0]
        .astype(np.complex64)
    )


def cut(path):
    write_raw(path, kspace=good())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def not_finite(path):
    kspace = good()
    kspace[0, 1, 2, 3] = np.nan
    write_raw(path, kspace=kspace)


def narrow_centre(path):
    mask = np.zeros(SIZE)
    mask[11:14] = 1
    write_raw(path, kspace=good(), mask=mask)


def outer_columns(path):
    write_raw(path, kspace=good() * (np.arange(SIZE) < 6))


BAD_SCANS = {
    "missing": (
        lambda path: None,
        "an HDF5 file was needed, there is no such file; check the path",
    ),
    "truncated": (cut, r"a complete HDF5 file was needed, .* copy or download it again"),
    "text": (lambda p: p.write_text("no scan"), r"a complete HDF5 file was needed, .* again"),
    "name": (
        lambda p: write_raw(p, data=good()),
        r"dataset 'kspace' was needed, the file has \['data'\]; rename or convert",
    ),
    "rank": (
        lambda p: write_raw(p, kspace=good()[0, 0]),
        r"kspace must have the axes \(slice, coil, row, column\), got .*; add or remove axes",
    ),
    "dtype": (
        lambda p: write_raw(p, kspace=good().real),
        "kspace must be complex64, got float32; convert it",
    ),
    "not finite": (not_finite, r"kspace must be finite, slice 0 holds 1 values .*leave the slice"),
    "empty mask": (
        lambda p: write_raw(p, kspace=good(), mask=np.zeros(SIZE)),
        "mask must keep at least one position, it keeps none; lower the acceleration",
    ),
    "mask width": (
        lambda p: write_raw(p, kspace=good(), mask=np.ones(SIZE + 1)),
        r"mask must have shape \(24, 24\), got \(25,\); draw it anew",
    ),
    "zero": (lambda p: write_raw(p, kspace=0 * good()), "mask must keep at least one position"),
    "centre": (narrow_centre, r"centre of 5 x 5 .* has 24 x 3; sample more of the centre"),
    "no centre": (outer_columns, r"centre of 5 x 5 .* has 0 x 0; sample more of the centre"),
}


@pytest.mark.parametrize(("write", "message"), BAD_SCANS.values(), ids=BAD_SCANS)
def test_a_scan_that_cannot_be_reconstructed_is_one_line(weights, tmp_path, write, message):
    path, out = tmp_path / "bad.h5", tmp_path / "out"
    write(path)
    options = ["--weights", weights, "--out", out / "image.h5", "--png", out / "image.png"]
    found = refused("reconstruct", "--scan", path, *options)
    assert re.search(rf"bad\.h5: .*{message}", found)
    assert not out.exists() or list(out.iterdir()) == []


def test_bad_scans_of_every_format_and_bad_names_are_one_line(formats, weights, tmp_path):
    def message(source, out="image.h5"):
        paths = ["--scan", source, "--weights", weights, "--out", tmp_path / "out" / out]
        return refused("reconstruct", *paths)

    for name in ("s_T201.h5", "s_T202.h5", "raw.mrd", "bart.cfl"):
        content = (formats / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    assert "s_T201.h5: a complete HDF5 file was needed" in message(tmp_path / "s_T2")
    assert "raw.mrd: a complete HDF5 file was needed" in message(tmp_path / "raw.mrd")
    (tmp_path / "bart.hdr").write_text("# Dimensions")
    assert "bart.hdr: a line '# Dimensions' was needed" in message(tmp_path / "bart")
    (tmp_path / "bart.hdr").write_bytes((formats / "bart.hdr").read_bytes())
    assert "half of them missing: convert or export" in message(tmp_path / "bart.hdr")
    (tmp_path / "head.nii").write_bytes(b"")
    assert "k-space was needed, NIfTI holds images" in message(tmp_path / "head.nii")
    assert "a scan was needed, one of M4Raw" in message(tmp_path / "none.dat")
    assert "must end in one of .h5, .hdf5, .nii, .nii.gz" in message(formats / "bart", "image.dcm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "a weights file was needed, there is none; train one first"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "a complete safetensors file was"),
        (lambda path: path.write_text("?"), "a complete safetensors file was needed"),
    ],
)
def test_weights_that_cannot_be_used_are_one_line(data, scan, weights, tmp_path, change, message):
    path, out = tmp_path / "w.safetensors", tmp_path / "out"
    path.write_bytes(weights.read_bytes())
    change(path)
    before = everything_in(tmp_path)
    for command, *source in (
        ("reconstruct", "--scan", scan, "--weights", path),
        ("evaluate", "--data", data / "test", "--weights", path),
        ("train", "--data", data / "train", "--init", path),
    ):
        assert re.search(f"w.safetensors: {message}", refused(command, *source, "--out", out / "x"))
    assert everything_in(tmp_path) == before


def test_places_that_cannot_be_written_are_one_line_before_any_work(
    data, scan, weights, tmp_path, monkeypatch
):
    def worked(*_):
        pytest.fail("worked in vain")

    for name in ("train.train", "scans.evaluate", "scans.reconstruct_scan"):
        monkeypatch.setattr(f"applications.mri.commands.{name}", worked)
    monkeypatch.setattr("applications.mri.simulation.phantoms.write_volume", worked)
    (tmp_path / "file").write_text("kept")
    calls = [
        ("demo",),
        ("simulate", "--size", 16),
        ("train", "--data", data / "train"),
        ("evaluate", "--data", data / "test", "--weights", weights),
        ("reconstruct", "--scan", scan, "--weights", weights),
        ("reconstruct", "--scan", scan, "--weights", weights, "--out", tmp_path / "o", "--png"),
    ]
    for arguments in calls:
        last = () if arguments[-1] == "--png" else ("--out",)
        found = refused(*arguments, *last, tmp_path / "file" / "below" / "out")
        assert re.search(r"file/below.*: the folder cannot be made .*; choose another", found)
        if arguments[0] in ("train", "evaluate", "reconstruct"):
            found = refused(*arguments, *last, tmp_path)
            assert "a file will be written, this is a folder; add a file name" in found
    assert everything_in(tmp_path) == {Path("file"): b"kept"}


def test_training_data_that_cannot_be_used_are_one_line(scan, data, tmp_path):
    out = tmp_path / "out" / "w.safetensors"
    options = ["--out", out, *MASK, "--steps", 1]
    found = refused("train", "--data", tmp_path / "none", *options)
    assert re.search("none: a folder of .h5 files was needed; this is none. Check the path", found)
    (tmp_path / "empty").mkdir()
    found = refused("train", "--data", tmp_path / "empty", *options)
    assert "empty: at least one .h5 file was needed, the folder has none" in found
    found = refused("train", "--data", scan.parent, *options)
    assert re.search(r"scan.h5: fully sampled k-space was needed, .*use other scans", found)
    found = refused("train", "--data", data / "train", *options, "--preset", "heavy")
    assert "preset must be one of paper, light, tiny, got 'heavy'" in found
    found = refused("train", "--data", data / "train", *options, "--learning-rate", -1)
    assert "learning_rate must be > 0, got -1" in found
    found = refused("train", "--data", data / "train", *options, "--center", 0.7)
    assert "center_fraction must be below 1 / acceleration = 0.5, got 0.7" in found
    assert not out.exists()


@pytest.mark.parametrize(
    ("mask", "option"),
    [
        ("random", "--spokes"),
        ("poisson", "--center"),
        ("radial", "--acceleration"),
        ("magic", "--calibration"),
        ("equispaced", "--width"),
    ],
)
def test_an_option_of_another_mask_is_refused_not_ignored(data, tmp_path, mask, option):
    options = ["--data", data / "train", "--out", tmp_path / "w", "--mask", mask, option, 3]
    assert f"{option} does not belong to --mask {mask}; leave it out" in refused("train", *options)
    assert list(tmp_path.iterdir()) == []


def test_scans_of_another_coil_count_are_fitted_and_every_command_says_so(data, scan, tmp_path):
    network = Network(replace(narrow(3), n_phases=1, filters=2, features=2))
    path = tmp_path / "w.safetensors"
    save_weights(path, Trained(network, network.controls(), {}))
    padded = "Coils 2 coils padded with zeros to 3"
    options = ["--init", path, "--out", tmp_path / "a", *MASK, "--steps", 1]
    assert padded in squeezed(succeed("train", "--data", data / "train", *options))
    options = ["--weights", path, "--out", tmp_path / "b", *MASK]
    assert padded in squeezed(succeed("evaluate", "--data", data / "test", *options))
    options = ["--weights", path, "--out", tmp_path / "c.h5"]
    assert padded in squeezed(succeed("reconstruct", "--scan", scan, *options))
    options = ["--preset", "tiny", "--coils", 1, "--out", tmp_path / "d", *MASK, "--steps", 1]
    text = squeezed(succeed("train", "--data", data / "train", *options))
    assert re.search(r"Coils 2 coils compressed to 1, \d\d\.\d % of the energy", text)
    assert load_weights(tmp_path / "d").network.architecture.n_coils == 1


def test_a_network_for_scans_of_several_coil_counts_needs_one_named(data, tmp_path):
    shutil.copy(next((data / "train").glob("*.h5")), tmp_path / "two.h5")
    write_volume(tmp_path / "three.h5", Volume(torch.ones(1, 3, SIZE, SIZE, dtype=torch.complex64)))
    options = ["--data", tmp_path, "--out", tmp_path / "w", *MASK]
    found = refused("train", *options, "--preset", "tiny")
    assert "one coil count was needed, the scans have 2, 3; choose one by --coils" in found


def test_weights_of_another_network_than_asked_for_are_refused_with_the_difference(
    data, weights, tmp_path
):
    options = ["--data", data / "train", "--out", tmp_path / "w", *MASK, "--init", weights]
    found = refused("train", *options, "--preset", "tiny")
    assert f"{weights}: weights of the network that --preset and --coils name were needed" in found
    assert "another architecture: n_phases is 2, not 3; filters is 3, not 8; features is" in found
    found = refused("train", *options, "--coils", 5)
    assert f"another architecture: n_coils is {COILS}, not 5; leave those options out" in found
    options = [*options[-2:], "--coils", 5, "--seconds", 1, "--task", f"name=a,scans={data}"]
    found = refused("meta-train", "--out", tmp_path / "m", *options)
    assert "n_coils is" in found
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_exit_code_130_and_one_line(data, tmp_path, monkeypatch):
    monkeypatch.setattr("applications.mri.training.keeping._SAVE_EVERY", -1.0)
    real, out = train, tmp_path / "w.safetensors"

    def interrupted(network, control, slices, settings, keeper, *rest):
        def stop(state):
            if state.step == 2:
                signal.raise_signal(signal.SIGINT)
            keeper(state)

        return real(network, control, slices, settings, stop, *rest)

    monkeypatch.setattr("applications.mri.commands.train.train", interrupted)
    found = call("train", "--data", data / "train", "--out", out, *MASK, "--steps", 9)
    assert found.exit_code == 130
    assert found.stderr == "interrupted: the files that were written are complete.\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == RESUMABLE
    assert load_weights(out).network.architecture == light()


REFUSED_THEN_SLOW = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
slow = sys.argv[1:]
sys.argv[1:] = {refused!r}
try:
    runpy.run_module("applications.mri", run_name="__main__")
except SystemExit as ended:
    print("refused with", ended.code, flush=True)
import applications.mri.training.keeping as keeping
keeping._SAVE_EVERY = -1.0
from applications.mri.__main__ import main
sys.argv[1:] = slow
main()
"""


def test_processes_end_with_the_right_code_and_no_traceback(data, weights, tmp_path):
    out, scan = tmp_path / "w.safetensors", tmp_path / "none.h5"
    paths = ["--scan", scan, "--weights", weights, "--out", tmp_path / "image.h5"]
    code = REFUSED_THEN_SLOW.format(refused=["reconstruct", *map(str, paths)])
    options = ["--data", data / "train", "--out", out, *MASK, "--seconds", 20]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, ["train", *options])],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 60
        while not out.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        shown, message = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "refused with 2\n" in shown
    assert message == (
        f"error: {scan}: an HDF5 file was needed, there is no such file; check the path.\n"
        "interrupted: the files that were written are complete.\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == RESUMABLE
    assert load_weights(out).network.architecture == light()
