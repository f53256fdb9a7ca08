"""Raw data as scanners write it, in ISMRMRD; `test_twix` has the same of Siemens files."""

import ismrmrd
import numpy as np
import pytest
import torch
from scan_files import coil_images, header, kspace_of, line, lines_of, write_ismrmrd

from applications.errors import InputError
from applications.mri.data import VolumeFile, open_scan
from applications.mri.formats.noise import whitening
from applications.mri.physics.operators import ifft2c

COILS, SAMPLES, COLUMNS = 2, 16, 10
WIDE = coil_images(COILS, SAMPLES, COLUMNS)
KSPACE = kspace_of(WIDE)
XML = header((SAMPLES, COLUMNS))
CALIBRATION, BOTH = ismrmrd.ACQ_IS_PARALLEL_CALIBRATION, 21
NOISE, REVERSE = ismrmrd.ACQ_IS_NOISE_MEASUREMENT, ismrmrd.ACQ_IS_REVERSE


def written(folder, lines, xml=XML):
    return VolumeFile(write_ismrmrd(folder / "scan.h5", lines, xml))


def assert_same(found, expected):
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("centre", [SAMPLES // 2 - 1, SAMPLES // 2], ids=["acquired", "forwards"])
@pytest.mark.parametrize("which", [range(COLUMNS), range(0, COLUMNS, 2), [7]])
def test_readouts_that_ran_backwards_are_flipped(tmp_path, which, centre):
    """Whether the centre is counted as acquired or as if they ran forwards."""
    backwards = [
        line(
            KSPACE[:, :, c].flip(1).numpy(), [REVERSE], kspace_encode_step_1=c, center_sample=centre
        )
        for c in which
    ]
    forwards = lines_of(KSPACE, [c for c in range(COLUMNS) if c not in which])
    volume = written(tmp_path, forwards + backwards)
    assert_same(ifft2c(volume.read_slice(0).kspace), WIDE[:, 4:12])
    (remark,) = volume.facts.remarks
    assert f"{len(which)} of {COLUMNS} readouts ran backwards and are flipped" in remark


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("missing", [1, 5])
def test_what_a_partial_echo_leaves_out_is_not_measured(tmp_path, missing, backwards):
    lines = []
    for column in range(COLUMNS):
        samples, centre = KSPACE[:, missing:, column].numpy(), SAMPLES // 2 - missing
        if backwards:
            samples, centre = samples[:, ::-1], samples.shape[1] - 1 - centre
        flags = [REVERSE] if backwards else []
        lines.append(line(samples, flags, kspace_encode_step_1=column, center_sample=centre))
    volume = written(tmp_path, lines)
    one = volume.read_slice(0)
    assert (volume.shape, volume.image_shape) == ((SAMPLES, COLUMNS), (SAMPLES // 2, COLUMNS))
    expected = KSPACE.clone()
    expected[:, :missing] = 0
    assert_same(one.kspace, expected)
    assert one.mask.any(1).tolist() == [False] * missing + [True] * (SAMPLES - missing)
    assert any("echoes are partial" in remark for remark in volume.facts.remarks)


def test_an_asymmetric_echo_is_shifted_to_the_centre(tmp_path):
    """Sixteen samples around the fifth: three rows are not measured, three samples fall out."""
    wider = kspace_of(coil_images(COILS, SAMPLES + 6, COLUMNS, seed=3))  # its centre is row 11
    lines = [
        line(wider[:, 6:, c].numpy(), kspace_encode_step_1=c, center_sample=5)
        for c in range(COLUMNS)
    ]
    volume = written(tmp_path, lines)
    one = volume.read_slice(0)
    assert one.mask[:, 0].tolist() == [False] * 3 + [True] * 13
    assert torch.equal(one.kspace[:, 3:], wider[:, 6:19])
    assert any("up to 3 samples a line lie outside" in one for one in volume.facts.remarks)


@pytest.mark.parametrize("mode", ["separate", "external", "other", None])
def test_lines_of_calibration_of_another_scan_calibrate_and_are_no_image(tmp_path, mode):
    xml = header((SAMPLES, COLUMNS), calibration=mode)
    if mode is None:
        xml = xml.replace("<calibrationMode>None</calibrationMode>", "")
    lines = lines_of(KSPACE, range(0, COLUMNS, 2))
    lines += lines_of(7 * KSPACE, range(3, 8), flags=[CALIBRATION])
    volume = written(tmp_path, lines, xml)
    one = volume.read_slice(0)
    columns = torch.arange(COLUMNS)
    assert_same(ifft2c(one.kspace), ifft2c(KSPACE * (columns % 2 == 0))[:, 4:12])
    assert one.mask[0].nonzero().flatten().tolist() == [0, 2, 4, 6, 8]
    expected = ifft2c(7 * KSPACE * ((columns >= 3) & (columns < 8)))[:, 4:12]
    assert_same(ifft2c(one.calibration), expected)
    assert "calibrate the coils" in volume.facts.remarks[0]


def test_lines_of_calibration_between_those_of_the_image_are_joined_with_them(tmp_path):
    xml = header((SAMPLES, COLUMNS), calibration="other")
    lines = lines_of(KSPACE, range(1, COLUMNS, 2), flags=[BOTH])
    lines += lines_of(KSPACE, [2, 4, 6], flags=[CALIBRATION])
    one = written(tmp_path, lines, xml).read_slice(0)
    assert one.mask[0].nonzero().flatten().tolist() == [1, 3, 5, 7, 9]
    measured = (one.calibration != 0).any(0)[0]
    assert measured.nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 9]


def test_lines_of_calibration_may_be_of_lower_resolution(tmp_path):
    xml = header((SAMPLES, COLUMNS), shown_x=SAMPLES, shown_x_mm=2 * SAMPLES, calibration="other")
    short = KSPACE[:, 4:12]
    lines = lines_of(KSPACE) + lines_of(short, range(3, 8), flags=[CALIBRATION])
    one = written(tmp_path, lines, xml).read_slice(0)
    assert_same(one.kspace, KSPACE)
    assert_same(one.calibration[:, 4:12, 3:8], short[..., 3:8])
    assert int((one.calibration != 0).any(0).sum()) == 8 * 5


@pytest.mark.parametrize("centre", [4, 7])
@pytest.mark.parametrize("same_view", [True, False])
def test_lines_of_calibration_may_have_an_encoding_of_their_own(tmp_path, same_view, centre):
    """Lines around a step of their own, of the field of view of the image or of another."""
    xml = header((SAMPLES, COLUMNS), calibration="separate")
    own = header((SAMPLES, 8), centre=centre, y_mm=15 if same_view else 12, shown_y_mm=12)
    start, end = own.index("<encoding>"), own.index("</encoding>") + len("</encoding>")
    xml = xml.replace("</ismrmrdHeader>", own[start:end] + "</ismrmrdHeader>")
    lines = lines_of(KSPACE)
    for column in range(3, 8):
        flags = {"encoding_space_ref": 1, "kspace_encode_step_1": column - 5 + centre}
        lines.append(line(7 * KSPACE[:, :, column].numpy(), [CALIBRATION], **flags))
    one = written(tmp_path, lines, xml).read_slice(0)
    assert_same(ifft2c(one.kspace), WIDE[:, 4:12])
    if same_view:
        columns = torch.arange(COLUMNS)
        expected = ifft2c(7 * KSPACE * ((columns >= 3) & (columns < 8)))[:, 4:12]
        assert_same(ifft2c(one.calibration), expected)
    else:
        assert one.calibration is None


@pytest.mark.parametrize("counter", ["repetition", "contrast", "phase", "set"])
@pytest.mark.parametrize("mode", ["separate", "embedded"])
def test_lines_of_calibration_measured_once_serve_all_volumes(tmp_path, mode, counter):
    """As in a series, whose first volume alone has them."""
    xml = header((SAMPLES, COLUMNS), calibration=mode)
    lines = lines_of(KSPACE, range(3, 8), flags=[CALIBRATION])
    for volume in range(3):
        lines += lines_of((1 + volume) * KSPACE, [0, 2, 8], **{counter: volume})
    path = write_ismrmrd(tmp_path / "scan.h5", lines, xml)
    columns = torch.arange(COLUMNS)
    expected = ifft2c(KSPACE * ((columns >= 3) & (columns < 8)))[:, 4:12]
    volumes = open_scan(path)
    assert len(volumes) == 3
    for number, volume in enumerate(volumes):
        one = volume.read_slice(0)
        own = 5 * (mode == "embedded" and number == 0)
        assert int(one.mask[0].sum()) == 3 + own
        lent = [text for text in volume.facts.remarks if "by those of another" in text]
        assert len(lent) == (number > 0)
        if own:
            assert one.calibration is None
        else:
            assert_same(ifft2c(one.calibration), expected)


def test_lines_of_calibration_that_are_counted_apart_make_no_volume(tmp_path):
    """Each slice has its own, under a contrast that no image has."""
    xml = header((SAMPLES, COLUMNS), calibration="separate")
    lines = []
    for number in range(2):
        place = {"slice": number, "position": (0, 0, 5 * number)}
        lines += lines_of((1 + number) * KSPACE, [0, 2, 8], **place)
        flagged = {"flags": [CALIBRATION], "contrast": 7, **place}
        lines += lines_of((3 + number) * KSPACE, range(3, 8), **flagged)
    (volume,) = open_scan(write_ismrmrd(tmp_path / "scan.h5", lines, xml))
    centre = torch.arange(COLUMNS)
    centre = (centre >= 3) & (centre < 8)
    for number in range(2):
        one = volume.read_slice(number)
        assert_same(ifft2c(one.calibration), ifft2c((3 + number) * KSPACE * centre)[:, 4:12])


def noise_samples(n_coils, n, seed=0):
    """Correlated, of unlike strength."""
    generator = np.random.default_rng(seed)
    white = generator.normal(size=(n_coils, n, 2)).view(complex)[..., 0]
    mixing = np.diag(1.0 + np.arange(n_coils)) + 0.3 * np.eye(n_coils, k=1) * 1j
    return (mixing @ white).astype(np.complex64)


def test_scans_of_noise_make_the_noise_of_the_image_white(tmp_path):
    noise = noise_samples(COILS, 4000)
    lines = [line(part, [NOISE]) for part in np.split(noise, 4, axis=1)]
    volume = written(tmp_path, lines + lines_of(KSPACE))
    matrix = whitening([noise], COILS)
    found = matrix @ noise
    covariance = np.cov(found, ddof=0)
    strength = float(noise.var(axis=1).mean())
    np.testing.assert_allclose(covariance, strength * np.eye(COILS), atol=1e-4 * strength)
    expected = torch.einsum("dc,cyx->dyx", torch.from_numpy(matrix), ifft2c(KSPACE)[:, 4:12])
    assert_same(ifft2c(volume.read_slice(0).kspace), expected)
    assert volume.facts.remarks == ("noise is whitened by the scans of noise",)


@pytest.mark.parametrize("noise", [noise_samples(3, 900), noise_samples(2, 3), np.ones((2, 900))])
def test_scans_of_noise_that_tell_nothing_leave_the_image_alone(tmp_path, noise):
    volume = written(tmp_path, [line(noise, [NOISE]), *lines_of(KSPACE)])
    assert_same(ifft2c(volume.read_slice(0).kspace), WIDE[:, 4:12])
    assert "noise is not whitened" in volume.facts.remarks[0]


def disc(rows=32, columns=32):
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    inside = ((y - rows / 2) / rows) ** 2 + ((x - columns / 2) / columns) ** 2 < 0.1
    return torch.stack([inside * (1 + x / columns), inside * (2 - y / rows)]).to(torch.complex128)


def off_centre(folder, declared):
    """A disc in 32 of 64 columns, whose zero frequency is step 16, whatever the header declares."""
    xml = header((32, 64), centre=declared, shown_x=32, shown_x_mm=64)
    return written(folder, lines_of(kspace_of(disc())), xml)


@pytest.mark.parametrize("declared", [26, 6, 0])
def test_a_wrong_centre_is_noticed_where_kspace_has_its_peak_elsewhere(tmp_path, declared):
    message = rf"scan.h5: slice 0: k-space has its peak near .* column {48 - declared},"
    with pytest.raises(InputError, match=message):
        off_centre(tmp_path, declared).read_slice(0)


@pytest.mark.parametrize("declared", [16, 14])
def test_a_centre_that_a_slope_of_phase_explains_is_taken(tmp_path, declared):
    one = off_centre(tmp_path, declared).read_slice(0)
    assert int(one.kspace.abs().sum((0, 1)).argmax()) == 48 - declared
