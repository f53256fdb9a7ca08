"""`reconstruct` and `evaluate` on what scanners bring: folders, bad slices, odd values."""

import json
import re
from dataclasses import replace

import h5py
import ismrmrd
import numpy as np
import pytest
import torch
from command_lines import call, refused, succeed
from scan_files import header, lines_of, write_ismrmrd

from applications.mri.bundled.paths import bundled_scan_path
from applications.mri.data import SliceDataset, Volume, VolumeFile, write_volume
from applications.mri.evaluation import scanning
from applications.mri.evaluation.methods import network_methods
from applications.mri.evaluation.metrics import score
from applications.mri.formats.fastmri_header import minimal_header
from applications.mri.network.architecture import narrow
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained, load_weights, save_weights
from applications.mri.physics.l1_spirit import l1_spirit
from applications.mri.physics.operators import centre_crop, rss
from applications.mri.sampling import CartesianRandom
from applications.mri.simulation.simulate import simulate

SIZE, COILS, SLICES = 24, 2, 3
SAMPLING = CartesianRandom(2.0, 0.3)
MASK = SAMPLING.mask((SIZE, SIZE), torch.Generator().manual_seed(1))
CHECKS = {"--json", "--adapt", "--no-check"}
OPTIONS = ("--acceleration", 2, "--center", 0.3)


def full(seed=0):
    generator = torch.Generator().manual_seed(seed)
    disc = torch.zeros(SIZE, SIZE)
    disc[5:18, 4:20] = 0.8
    disc[9:12, 8:12] = 0.2
    return torch.stack([simulate(disc, COILS, generator).kspace for _ in range(SLICES)])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    network = Network(replace(narrow(COILS), n_phases=2, filters=3, features=2), 1)
    save_weights(path, Trained(network, network.controls(), {}))
    return path


def images_of(path):
    with h5py.File(path) as file:
        return torch.from_numpy(file["reconstruction"][()]), dict(file.attrs)


def expected(weights, kspace, mask=MASK, calibration=None):
    trained = load_weights(weights)
    scan = trained.network.prepare(kspace[None] * mask, mask, calibration)
    return trained.network.reconstruct(scan, trained.control).image[0]


def reconstruct(weights, scan, out, *options):
    options = ("--weights", weights, "--out", out, *options)
    if not CHECKS & set(options):  # untrained weights: the images shall be theirs
        options += ("--no-check",)
    return squeezed(succeed("reconstruct", "--scan", scan, *options))


def squeezed(text):
    return " ".join(text.split())


def spoil(kspace, value, index):
    kspace = kspace.clone()
    if value == 0:
        kspace[index] = 0
    else:
        kspace[index, 0, 3, 3] = value
    return kspace


BAD = [0, float("nan"), float("inf")]


@pytest.mark.parametrize(
    ("value", "index"),
    [
        pytest.param(value, index, marks=[] if BAD.index(value) == index else pytest.mark.slow)
        for value in BAD
        for index in range(SLICES)
    ],
)
def test_a_slice_that_cannot_be_used_is_written_as_zeros_and_named(weights, tmp_path, value, index):
    scan, out = tmp_path / "scan.h5", tmp_path / "image.h5"
    kspace = full()
    write_volume(scan, Volume(spoil(kspace * MASK, value, index), mask=MASK[0]))
    text = reconstruct(weights, scan, out, "--png", tmp_path / "image.png")
    assert f"Left out {scan}: " in text
    assert f"slice {index} " in text
    images, attributes = images_of(out)
    assert attributes["left_out"].tolist() == [index]
    for k in range(SLICES):
        wanted = torch.zeros(SIZE, SIZE) if k == index else expected(weights, kspace[k])
        torch.testing.assert_close(images[k], wanted, rtol=1e-4, atol=1e-5)


def test_a_scan_without_any_slice_leaves_nothing(weights, tmp_path):
    scan = tmp_path / "scan.h5"
    write_volume(scan, Volume(0 * full()))
    options = ("--weights", weights, "--out", tmp_path / "image.h5")
    assert "slice 2 is zero throughout" in refused("reconstruct", "--scan", scan, *options)
    assert list(tmp_path.iterdir()) == [scan]


def test_names_with_brackets_are_printed_as_they_are(weights, tmp_path):
    scan = tmp_path / "scan[b].h5"
    write_volume(scan, Volume(full() * MASK))
    text = reconstruct(weights, scan, tmp_path / "image[red].h5")
    assert "scan[b].h5: of slice 0, 1, 2, 11 of 24 columns" in text
    assert "image[red].h5" in text
    folder = tmp_path / "folder[i]"
    folder.mkdir()
    scan.rename(folder / scan.name)
    assert "│ scan[b].h5 │ 3 │" in reconstruct(weights, folder, tmp_path / "out")


@pytest.mark.parametrize("factor", [1e20, 1e25, 1e-20, 1e-30])
def test_values_of_any_size_are_reconstructed_in_the_units_of_the_scan(weights, tmp_path, factor):
    kspace = full()
    write_volume(tmp_path / "scan.h5", Volume(kspace * MASK * factor, mask=MASK[0]))
    reconstruct(weights, tmp_path / "scan.h5", tmp_path / "image.h5")
    images, _ = images_of(tmp_path / "image.h5")
    for k in range(SLICES):
        found = (images[k].double() / factor).float()
        torch.testing.assert_close(found, expected(weights, kspace[k]), rtol=1e-3, atol=1e-4)


def test_evaluation_does_not_depend_on_the_unit_and_leaves_bad_slices_out(weights, tmp_path):
    kspace = full()
    scores = []
    for name, factor in (("one", 1.0), ("huge", 1e20), ("tiny", 1e-22)):
        folder = tmp_path / name
        folder.mkdir()
        write_volume(folder / "a.h5", Volume(spoil(kspace * factor, 0, 1)))
        text = call(
            *("evaluate", "--data", folder, "--weights", weights, "--out", folder / "s.json"),
            *OPTIONS,
        )
        assert text.exit_code == 0, text.output
        assert "slice 1 is zero throughout" in squeezed(text.output)
        scores.append(json.loads((folder / "s.json").read_text()))
        assert "Left out" in scores[-1]["remarks"][0]
    for one in scores[1:]:
        for name, found in one["mean"].items():
            wanted = scores[0]["mean"][name]
            assert found["psnr"] == pytest.approx(wanted["psnr"], abs=1e-2)
            assert found["ssim"] == pytest.approx(wanted["ssim"], abs=1e-3)


def test_the_image_has_the_matrix_that_the_header_asks_for(weights, tmp_path):
    kspace, shown = full(), (SIZE, SIZE - 10)
    header = minimal_header((SIZE, SIZE), shown)
    volume = Volume(kspace * MASK, mask=MASK[0], header=header)
    write_volume(tmp_path / "scan.h5", volume)
    reconstruct(weights, tmp_path / "scan.h5", tmp_path / "image.h5")
    images, _ = images_of(tmp_path / "image.h5")
    wanted = torch.stack([centre_crop(expected(weights, one), shown) for one in kspace])
    torch.testing.assert_close(images, wanted, rtol=1e-4, atol=1e-5)


def test_zeros_without_a_mask_are_said_and_not_scored_or_trained_on(weights, tmp_path):
    kspace = full()
    (tmp_path / "data").mkdir()
    scan = tmp_path / "data" / "scan.h5"
    write_volume(scan, Volume(kspace * MASK))
    text = reconstruct(weights, scan, tmp_path / "image.h5")
    zero = int((~MASK[0]).sum())
    said = f"{zero} of {SIZE} columns are zero in all coils and count as not measured"
    assert f"scan.h5: of slice 0, 1, 2, {said}" in text
    options = ("--data", scan.parent, *OPTIONS, "--out", tmp_path / "out")
    for command in (("evaluate", "--weights", weights), ("train", "--steps", 1)):
        assert f"scan.h5: fully sampled k-space was needed, of slice 0 {said}; use" in refused(
            *command, *options
        )
    (tmp_path / "tasks").mkdir()
    scan.parent.rename(tmp_path / "tasks" / "train")
    named = f"name=a,roles=train,scans={tmp_path / 'tasks'}"
    task = ("--task", named, "--steps", 1, "--out", tmp_path / "out")
    assert "fully sampled k-space was needed" in refused("train", *task)
    assert not (tmp_path / "out").exists()
    # Undersampled scans are what self-supervision is for.
    folder = tmp_path / "tasks" / "train"
    succeed("train", "--data", folder, "--self-supervised", "--calibration", 6, *task[2:])


def test_coils_are_calibrated_by_lines_of_another_scan(weights, tmp_path):
    """Every second column, which has no centre of its own, and a separate scan of the centre."""
    kspace = full()[0]
    xml = header((SIZE, SIZE), shown_x=SIZE, shown_x_mm=2 * SIZE, calibration="separate")
    lines = lines_of(kspace, range(0, SIZE, 2))
    scan = write_ismrmrd(tmp_path / "scan.h5", lines, xml)
    options = ("--scan", scan, "--weights", weights, "--out", tmp_path / "image.h5")
    assert "sample more of the centre" in refused("reconstruct", *options)
    scan.unlink()
    flags = [ismrmrd.ACQ_IS_PARALLEL_CALIBRATION]
    write_ismrmrd(scan, lines + lines_of(3 * kspace, range(6, 18), flags=flags), xml)
    text = reconstruct(weights, scan, tmp_path / "image.h5")
    assert "calibrate the coils" in text
    centre = torch.zeros_like(kspace)
    centre[..., 6:18] = 3 * kspace[..., 6:18]
    mask = (torch.arange(SIZE) % 2 == 0).repeat(SIZE, 1)
    wanted = expected(weights, kspace, mask, centre[None])
    torch.testing.assert_close(images_of(tmp_path / "image.h5")[0][0], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (np.zeros((SLICES, SIZE, SIZE)), "reference must have a positive maximum"),
        (np.ones((SLICES, 5, 5)), "rows and columns at least 7"),
        (np.ones((SLICES, 2 * SIZE, 2 * SIZE)), "a reference of at most 24 x 24"),
    ],
    ids=["zero", "too small", "too large"],
)
def test_a_reference_that_is_none_is_named_with_its_file(weights, tmp_path, reference, message):
    path = tmp_path / "a.h5"
    write_volume(path, Volume(full()))
    with h5py.File(path, "a") as file:
        file["reconstruction_rss"] = reference.astype(np.float32)
    options = ("--data", tmp_path, "--weights", weights, "--out", tmp_path / "s.json", *OPTIONS)
    assert re.search(rf"a\.h5: .*{message}", refused("evaluate", *options))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for k, name in enumerate(("a.h5", "b.H5", "c.hdf5")):
        write_volume(folder / name, Volume(full(k) * MASK, mask=MASK[0]))
    (folder / "._a.h5").write_bytes(b"of macOS")
    (folder / "notes.txt").write_text("notes")
    (folder / "other.dat").write_text("not of a scanner")
    xml = header((SIZE, SIZE), shown_x=SIZE, shown_x_mm=2 * SIZE)
    write_ismrmrd(folder / "d.mrd", lines_of(full(3)[0]), xml)
    return folder


def test_a_folder_of_scans_of_any_format_is_reconstructed(weights, folder, tmp_path):
    (folder / "gre.dat").write_bytes(bundled_scan_path().read_bytes())
    out = tmp_path / "images"
    text = reconstruct(weights, folder, out, "--png", tmp_path / "pictures")
    assert sorted(p.name for p in out.iterdir()) == ["a.h5", "b.h5", "c.h5", "d.h5", "gre.h5"]
    pictures = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    assert pictures == ["a.png", "b.png", "c.png", "d.png", "gre.png"]
    for k, name in enumerate(("a.h5", "b.h5", "c.h5")):
        images, attributes = images_of(out / name)
        wanted = torch.stack([expected(weights, one) for one in full(k)])
        torch.testing.assert_close(images, wanted, rtol=1e-4, atol=1e-5)
        assert attributes["source"].lower() == name.replace("c.h5", "c.hdf5")
    assert all(f"│ {name}" in text for name in ("a.h5", "b.H5", "c.hdf5", "d.mrd", "gre.dat"))
    assert f"Images 5 of 5 scans in {out}" in text
    reconstruct(weights, folder, out, "--suffix", ".nii.gz")
    assert (out / "gre.nii.gz").is_file()


def test_a_bad_scan_of_a_folder_is_refused_before_any_work_or_skipped(weights, folder, tmp_path):
    (folder / "bad.h5").write_text("no scan")
    write_volume(folder / "zero.h5", Volume(0 * full()))
    out = tmp_path / "images"
    options = ("--scan", folder, "--weights", weights, "--out", out)
    assert "bad.h5: a complete HDF5 file was needed" in refused("reconstruct", *options)
    assert not out.exists()
    text = squeezed(succeed("reconstruct", *options, "--skip-bad"))
    assert sorted(p.name for p in out.iterdir()) == ["a.h5", "b.h5", "c.h5", "d.h5"]
    assert "│ bad.h5 │ skipped" in text
    assert f"Skipped {folder / 'bad.h5'}: a complete HDF5 file was needed" in text
    assert f"Skipped {folder / 'zero.h5'}: slice 2 is zero throughout" in text
    assert f"Images 4 of 6 scans in {out}" in text
    for one in folder.glob("*.*"):
        if one.name not in ("bad.h5", "zero.h5"):
            one.unlink()
    assert "at least one scan was needed that can be used" in refused(
        "reconstruct", *options, "--skip-bad"
    )


def test_images_of_a_folder_never_replace_its_scans(weights, folder, tmp_path):
    before = {p: p.read_bytes() for p in folder.iterdir()}
    options = ("--scan", folder, "--weights", weights, "--out")
    assert "a.h5: the output must not be an input" in refused("reconstruct", *options, folder)
    assert "images of a folder of scans go to a folder" in refused(
        "reconstruct", *options, tmp_path / "i.h5"
    )
    assert "must end in one of" in refused(
        "reconstruct", *options, tmp_path / "i", "--suffix", ".png"
    )
    found = refused("reconstruct", *options, tmp_path / "i", "--suffix", "/../i.h5")
    assert "--suffix must be the end of a name" in found
    (tmp_path / "none").mkdir()
    options = ("--scan", tmp_path / "none", "--weights", weights, "--out", tmp_path / "i")
    assert "none: at least one scan was needed, the folder has none" in refused(
        "reconstruct", *options
    )
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_scans_of_one_name_get_images_of_their_own(weights, tmp_path):
    folder, out = tmp_path / "scans", tmp_path / "images"
    folder.mkdir()
    for name in ("a.h5", "a.hdf5", "A.H5"):
        write_volume(folder / name, Volume(full() * MASK, mask=MASK[0]))
    options = ("--scan", folder, "--weights", weights, "--out", out)
    assert "each scan needs outputs of its own" in refused("reconstruct", *options)
    (folder / "A.H5").unlink()
    reconstruct(weights, folder, out)
    assert sorted(p.name for p in out.iterdir()) == ["a.h5.h5", "a.hdf5.h5"]


def test_evaluation_leaves_images_and_error_maps(weights, tmp_path):
    data, out = tmp_path / "data", tmp_path / "images"
    data.mkdir()
    for k, name in enumerate(("a.h5", "b.h5")):
        write_volume(data / name, Volume(spoil(full(k), 0, k)))
    options = ("--data", data, "--weights", weights, "--out", tmp_path / "s.json", *OPTIONS)
    succeed("evaluate", *options, "--images", out)
    assert sorted(p.name for p in out.iterdir()) == ["a.h5", "a.png", "b.h5", "b.png"]
    found = json.loads((tmp_path / "s.json").read_text())
    generator = torch.Generator().manual_seed(2)
    method = network_methods(load_weights(weights))["ours"]
    for volume, file in zip(found["volumes"], SliceDataset(data).files, strict=True):
        mask = SAMPLING.mask((SIZE, SIZE), generator)
        kept = [k for k in range(SLICES) if k != "ab".index(file.path.stem)]
        with h5py.File(out / file.path.name) as images:
            reference = images["reference"][()]
            assert set(images["images"]) == set(images["errors"]) == set(volume["scores"])
            ours = images["images/ours"][()]
            np.testing.assert_array_equal(images["errors/ours"][()], np.abs(ours - reference))
        wanted = [method(file.read_slice(k).kspace * mask, mask) for k in kept]
        np.testing.assert_allclose(ours, torch.stack(wanted), rtol=1e-4, atol=1e-5)
        assert score(reference, ours).psnr == pytest.approx(volume["scores"]["ours"]["psnr"])
        assert (out / f"{file.path.stem}.png").read_bytes().startswith(b"\x89PNG")
    (out / "a.png").write_text("notes")
    assert "a.png: a file lies there that is not a picture" in refused(
        "evaluate", *options, "--images", out
    )


@pytest.mark.parametrize("how", ["same folder", "link", "hard link", "copy", "one of two"])
def test_methods_are_never_tuned_on_what_they_are_scored_on(weights, tmp_path, how):
    data, other = tmp_path / "data", tmp_path / "other"
    data.mkdir()
    write_volume(data / "a.h5", Volume(full()))
    write_volume(data / "b.h5", Volume(full(1)))
    if how == "same folder":
        other = data / ".." / "data"
    elif how == "link":
        other.symlink_to(data)
    else:
        other.mkdir()
        if how == "hard link":
            (other / "x.h5").hardlink_to(data / "b.h5")
        else:
            (other / "x.h5").write_bytes((data / "b.h5").read_bytes())
        if how == "one of two":
            write_volume(other / "new.h5", Volume(full(2)))
    options = ("--data", data, "--weights", weights, "--out", tmp_path / "s.json", *OPTIONS)
    found = refused("evaluate", *options, "--baselines", other)
    assert "methods must be tuned on other scans than they are scored on" in found
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize("command", ["reconstruct", "evaluate"])
@pytest.mark.parametrize("device", ["cuda:7", "tpu", "cpu:1x"])
def test_a_device_that_is_not_there_is_one_line(weights, tmp_path, command, device):
    write_volume(tmp_path / "a.h5", Volume(full() * MASK, mask=MASK[0]))
    source = ("--scan", tmp_path / "a.h5") if command == "reconstruct" else ("--data", tmp_path)
    options = (*source, "--weights", weights, "--out", tmp_path / "o.h5", "--device", device)
    assert "device" in refused(command, *options)


def test_the_device_is_where_the_network_works(weights, tmp_path, monkeypatch):
    """The meta device computes nothing: what reaches the network there was sent there."""
    write_volume(tmp_path / "a.h5", Volume(full()))
    seen = set()

    def watched(place):
        plain = getattr(*place)

        def call(*given, **more):
            tensors = [one for one in given if isinstance(one, torch.Tensor)]
            seen.add(tuple(str(one.device) for one in tensors[:2]))
            return plain(*given, **more)

        monkeypatch.setattr(*place, call)

    watched((scanning, "reconstruct"))
    watched((Network, "prepare"))
    monkeypatch.setattr("applications.mri.commands.scans.check_device", lambda _: None)
    for command, *source in (
        ("reconstruct", "--scan", tmp_path / "a.h5"),
        ("evaluate", "--data", tmp_path, *OPTIONS),
    ):
        options = ("--weights", weights, "--out", tmp_path / f"{command}.h5", "--device", "meta")
        assert call(command, *source, *options).exit_code != 0  # there are no numbers there
        assert seen == {("meta", "meta")}
        seen.clear()


@pytest.mark.cuda
def test_a_gpu_gives_the_images_of_the_cpu(weights, tmp_path):
    write_volume(tmp_path / "a.h5", Volume(full() * MASK, mask=MASK[0]))
    for device in ("cpu", "cuda"):
        reconstruct(weights, tmp_path / "a.h5", tmp_path / f"{device}.h5", "--device", device)
    cpu, gpu = (images_of(tmp_path / f"{device}.h5")[0] for device in ("cpu", "cuda"))
    torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-4)
    (tmp_path / "data").mkdir()
    write_volume(tmp_path / "data" / "a.h5", Volume(full()))
    options = ("--data", tmp_path / "data", "--weights", weights, *OPTIONS, "--out")
    for device in ("cpu", "cuda"):
        succeed("evaluate", *options, tmp_path / f"{device}.json", "--device", device)
    cpu, gpu = (
        json.loads((tmp_path / f"{d}.json").read_text())["mean"]["ours"] for d in ("cpu", "cuda")
    )
    assert gpu["psnr"] == pytest.approx(cpu["psnr"], abs=1e-2)


def verdicts(weights, tmp_path, *options):
    write_volume(tmp_path / "s.h5", Volume(full() * MASK, mask=MASK))
    out, record = tmp_path / "i.h5", tmp_path / "v.json"
    said = squeezed(reconstruct(weights, tmp_path / "s.h5", out, "--json", record, *options))
    images, attributes = images_of(out)
    return said, images, attributes, json.loads(record.read_text())["scans"][0]["slices"]


def test_slices_that_the_check_does_not_trust_are_named_and_replaced(weights, tmp_path):
    said, images, attributes, slices = verdicts(weights, tmp_path)
    bad = [one["slice"] for one in slices if not one["trustworthy"]]
    assert bad, "the untrained network is worse than l1-SPIRiT on these"
    assert [one["method"] for one in slices] == list(attributes["methods"])
    assert list(attributes["trustworthy"]) == [one["trustworthy"] for one in slices]
    assert list(attributes["held_out_errors"]) == pytest.approx(
        [one["held_out_error"] for one in slices]
    )
    assert "is not trustworthy" in said
    for k, one in enumerate(slices):
        kspace = full()[k] * MASK
        classical = rss(l1_spirit(kspace, MASK))
        wanted = classical if one["method"] == "l1-spirit" else expected(weights, full()[k])
        torch.testing.assert_close(images[k], wanted, rtol=1e-4, atol=1e-5)


def test_the_images_of_the_network_are_kept_without_fallback_and_without_check(weights, tmp_path):
    said, images, _, slices = verdicts(weights, tmp_path, "--no-fallback")
    assert "is not trustworthy" in said
    assert {one["method"] for one in slices} == {"network"}
    plain, again, attributes, slices = verdicts(weights, tmp_path, "--no-check")
    assert "trustworthy" not in plain
    assert "trustworthy" not in attributes
    assert "trustworthy" not in slices[0]
    torch.testing.assert_close(images, again)


def test_a_network_is_adapted_to_the_scan_and_what_came_of_it_is_said(weights, tmp_path):
    with pytest.raises(AssertionError, match="--adapt: at least two sampled positions outside"):
        verdicts(weights, tmp_path, "--adapt", 2)  # 24 columns: all of it is centre
    image = torch.nn.functional.pad(torch.full((30, 34), 0.7), (15, 15, 17, 17))
    wide = simulate(image, COILS, torch.Generator().manual_seed(0)).kspace[None]
    mask = SAMPLING.mask((64, 64), torch.Generator().manual_seed(1))
    write_volume(tmp_path / "wide.h5", Volume(wide * mask, mask=mask))
    out = tmp_path / "wide_images.h5"
    said = reconstruct(weights, tmp_path / "wide.h5", out, "--adapt", 2)
    assert re.search(r"Adapted to the scan: held-out error \S+ to \S+; (not )?kept\.", said)


def test_adapting_leaves_zero_slices_out_and_reads_no_slice_twice(weights, tmp_path, monkeypatch):
    image = torch.nn.functional.pad(torch.full((30, 34), 0.7), (15, 15, 17, 17))
    one = simulate(image, COILS, torch.Generator().manual_seed(0)).kspace
    mask = SAMPLING.mask((64, 64), torch.Generator().manual_seed(1))
    volume = torch.stack([0 * one, one, one * float("nan"), 0.9 * one, 0 * one]) * mask
    write_volume(tmp_path / "ends.h5", Volume(volume, mask=mask))
    read, plain = [], VolumeFile.read_slice
    monkeypatch.setattr(
        VolumeFile, "read_slice", lambda self, index: (read.append(index), plain(self, index))[1]
    )
    out = tmp_path / "images.h5"
    said = reconstruct(weights, tmp_path / "ends.h5", out, "--adapt", 3)
    images, attributes = images_of(out)
    assert attributes["left_out"].tolist() == [0, 2, 4]
    assert not images[[0, 2, 4]].any()
    assert images[[1, 3]].flatten(1).any(1).all()
    assert "Adapted to the scan" in said
    assert max(read.count(k) for k in (1, 3)) == 1
