"""Siemens files, made from the bundled one by twixtools: its lines in other orders and roles."""

import sys

import numpy as np
import pytest
import torch
import twixtools

from applications.errors import InputError
from applications.mri.bundled.paths import bundled_scan_path
from applications.mri.data import VolumeFile, fully_sampled, open_scan
from applications.mri.formats.noise import whitening
from applications.mri.physics.operators import ifft2c

GRE = bundled_scan_path()
N, WIDE, CENTRE = 160, 320, 80


def parsed():
    """The measurement of the bundled file, its blocks in memory."""
    (scan,) = twixtools.read_twix(str(GRE), parse_pmu=False, parse_geometry=False, verbose=False)
    return {**scan, "mdb": [one.convert_to_local() for one in scan["mdb"]]}


def changed(block, factor=1.0, samples=slice(None), flags=(), centre=None, **counters):
    """A copy of a block, its samples cut and multiplied; counters by their names in TWIX."""
    data = np.ascontiguousarray(block.data[:, samples] * factor)
    found = twixtools.mdb.Mdb_local(data)
    found.mdh = type(block.mdh).from_buffer_copy(bytes(block.mdh))
    found.data = data
    for flag in flags:
        found.add_flag(flag)
    for name, value in counters.items():
        setattr(found.mdh.Counter, name, value)
    if centre is not None:
        found.mdh.CenterCol = centre
    return found


def written(path, scan, blocks, capsys, before=()):
    twixtools.write_twix([*before, {**scan, "mdb": list(blocks)}], str(path))
    capsys.readouterr()  # the package prints
    return path


@pytest.fixture(scope="module")
def scan():
    return parsed()


@pytest.fixture(scope="module")
def kspace():
    return VolumeFile(GRE).read_slice(0).kspace


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_bundled_scan_is_a_phantom_of_two_coils_fully_sampled(scan, kspace):
    (volume,) = open_scan(GRE)
    assert (volume.n_slices, volume.n_coils, volume.shape) == (1, 2, (N, N))
    assert (volume.acquisition, volume.facts.remarks) == ("gre", ())
    assert volume.facts.geometry.spacing == pytest.approx((1.25, 1.25, 4))
    affine = np.array(volume.facts.geometry.affine)
    # The middle of the slice by the protocol, left and posterior being positive there.
    assert affine @ (80, 80, 0, 1) == pytest.approx((2.5897, -53.9224, -53.9995, 1), abs=1e-3)
    normal = affine[:3, 2] / 4
    assert normal * (-1, -1, 1) == pytest.approx((0, 0.03839, 0.99926), abs=1e-4)
    # Twice oversampled: the image is the middle of that of all samples.
    wide = torch.from_numpy(np.stack([one.data for one in scan["mdb"]], axis=-1))
    assert_same(ifft2c(kspace), ifft2c(wide)[:, 80:240])
    _, image = fully_sampled(volume.read_slice(0))
    assert float(image[40:120, 20:40].mean()) > 5 * float(image[:12, :12].mean())  # water, and air


def test_it_is_told_from_the_content_and_reads_nothing_else(scan, kspace, tmp_path, capsys):
    path = written(tmp_path / "meas.raw", scan, scan["mdb"], capsys)
    assert torch.equal(VolumeFile(path).read_slice(0).kspace, kspace)
    (tmp_path / "other.dat").write_bytes(b"\1\0\0\0" * 9000)
    with pytest.raises(InputError, match=r"other.dat: a scan was needed, one of .*Siemens TWIX"):
        open_scan(tmp_path / "other.dat")
    assert capsys.readouterr().out == ""


def test_averages_are_averaged_and_repetitions_are_volumes(scan, kspace, tmp_path, capsys):
    blocks = scan["mdb"]
    lines = [*blocks, *(changed(one, 3.0, Ave=1) for one in blocks[:40])]
    lines += [changed(one, 5.0, Rep=1) for one in blocks]
    first, second = open_scan(written(tmp_path / "a.dat", scan, lines, capsys))
    weights = torch.ones(N)
    weights[:40] = 2  # the mean of 1 and 3
    assert_same(first.read_slice(0).kspace, weights * kspace)
    assert_same(second.read_slice(0).kspace, 5 * kspace)


def test_slices_lie_in_order_of_position(scan, kspace, tmp_path, capsys):
    lines = []
    for counter, place in enumerate((0.0, -8.0, 4.0)):
        for one in scan["mdb"]:
            block = changed(one, 1.0 + counter, Sli=counter)
            block.mdh.SliceData.SlicePos.Tra += place
            lines.append(block)
    (volume,) = open_scan(written(tmp_path / "a.dat", scan, lines, capsys))
    assert volume.n_slices == 3
    for index, factor in enumerate((2, 1, 3)):
        assert_same(volume.read_slice(index).kspace, factor * kspace)
    assert volume.facts.geometry.affine is None  # 8 mm, then 4 mm apart


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in the scan", "in a scan before"])
def test_scans_of_noise_whiten(scan, kspace, tmp_path, capsys, elsewhere):
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(2, 8, WIDE, 2)).view(complex)[..., 0]
    noise = np.einsum("dc,cns->dns", [[1, 0.5j], [0, 3]], noise).astype(np.complex64)
    blocks = []
    for k in range(8):
        block = changed(scan["mdb"][0], flags=["NOISEADJSCAN"])
        block.data = noise[:, k]
        blocks.append(block)
    if elsewhere:
        path = written(
            tmp_path / "a.dat", scan, scan["mdb"], capsys, before=[{**scan, "mdb": blocks}]
        )
    else:
        path = written(tmp_path / "a.dat", scan, [*blocks, *scan["mdb"]], capsys)
    volume = VolumeFile(path)
    assert volume.facts.remarks == ("noise is whitened by the scans of noise",)
    white = torch.from_numpy(whitening(list(noise.transpose(1, 0, 2)), 2))
    assert_same(volume.read_slice(0).kspace, torch.einsum("dc,cyx->dyx", white, kspace))


def test_reflected_lines_are_flipped(scan, kspace, tmp_path, capsys):
    lines = [
        changed(one, samples=slice(None, None, -1), flags=["REFLECT"]) if k % 2 else one
        for k, one in enumerate(scan["mdb"])
    ]
    volume = VolumeFile(written(tmp_path / "a.dat", scan, lines, capsys))
    assert_same(volume.read_slice(0).kspace, kspace)
    assert "80 of 160 readouts ran backwards and are flipped" in volume.facts.remarks[0]


def test_partial_echoes_are_not_measured_where_they_are_cut(scan, kspace, tmp_path, capsys):
    cut = 64
    lines = [changed(one, samples=slice(cut, None), centre=160 - cut) for one in scan["mdb"]]
    volume = VolumeFile(written(tmp_path / "a.dat", scan, lines, capsys))
    one = volume.read_slice(0)
    assert (volume.shape, volume.image_shape) == ((WIDE, N), (N, N))
    assert one.mask.all(1).tolist() == [False] * cut + [True] * (WIDE - cut)
    wide = torch.from_numpy(np.stack([block.data for block in scan["mdb"]], axis=-1))
    assert torch.equal(one.kspace[:, cut:], wide[:, cut:])
    assert not one.kspace[:, :cut].any()


def test_lines_of_reference_calibrate_and_are_no_image(scan, kspace, tmp_path, capsys):
    """The protocol has no parallel imaging: it does not say what they are."""
    blocks = scan["mdb"]
    reference = [changed(one, 7.0, flags=["PATREFSCAN"]) for one in blocks[68:92]]
    volume = VolumeFile(written(tmp_path / "a.dat", scan, [*blocks[::2], *reference], capsys))
    one = volume.read_slice(0)
    columns = torch.arange(N)
    assert_same(one.kspace, kspace * (columns % 2 == 0))
    assert_same(one.calibration, 7 * kspace * ((columns >= 68) & (columns < 92)))


def test_navigators_and_synchronous_data_are_left_out(scan, kspace, tmp_path, capsys):
    wrong = [changed(scan["mdb"][80], 1e6, flags=[flag]) for flag in ("PHASCOR", "RTFEEDBACK")]
    volume = VolumeFile(written(tmp_path / "a.dat", scan, [*wrong, *scan["mdb"]], capsys))
    assert_same(volume.read_slice(0).kspace, kspace)


BAD = {
    "cut": (lambda c: c[: len(c) // 2], "the end of the measurement is missing; copy"),
    "a line short": (lambda c: c[:-3000], "the end of the measurement is missing; copy"),
    "header alone": (lambda c: c[:20_000], "a complete TWIX file was needed"),
}


@pytest.mark.parametrize(("cut", "message"), BAD.values(), ids=BAD)
def test_a_damaged_file_is_refused_and_nothing_is_printed(tmp_path, capsys, cut, message):
    path = tmp_path / "meas.dat"
    path.write_bytes(cut(GRE.read_bytes()))
    with pytest.raises(InputError, match=f"meas.dat: .*{message}"):
        open_scan(path)
    assert capsys.readouterr().out == ""


def test_scans_of_three_dimensions_are_refused_by_name(scan, tmp_path, capsys):
    lines = [*scan["mdb"], *(changed(one, Par=1) for one in scan["mdb"])]
    path = written(tmp_path / "a.dat", scan, lines, capsys)
    with pytest.raises(InputError, match=r"a.dat: a 2-D scan was needed, .* second phase encoding"):
        open_scan(path)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "twixtools", None)
    message = r"gre.dat: the package twixtools is needed .* pip install 'bilevel\[mri-formats\]'"
    with pytest.raises(InputError, match=message):
        open_scan(GRE)
