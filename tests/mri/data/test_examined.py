"""Slices that cannot be used, values out of range, zeros not measured, peaks elsewhere."""

import re

import h5py
import numpy as np
import pytest
import torch
from scan_files import coil_images, kspace_of

from applications.errors import InputError
from applications.mri.bundled.paths import bundled_scan_path
from applications.mri.data import (
    SliceDataset,
    UnusableSliceError,
    VolumeFile,
    examined,
    fully_sampled,
)
from applications.mri.data.centre import check_beyond, check_centre
from applications.mri.physics.operators import fft2c, ifft2c, rss
from applications.mri.sampling import CartesianRandom, PoissonDisc
from applications.mri.training.examples import draw_full

SLICES, COILS, ROWS, COLUMNS = 4, 2, 12, 10
KSPACE = kspace_of(coil_images(SLICES, COILS, ROWS, COLUMNS)).numpy()


def written(path, kspace=KSPACE, **datasets):
    with h5py.File(path, "w") as file:
        file["kspace"] = kspace
        for name, value in datasets.items():
            file[name] = value
    return VolumeFile(path)


def spoilt(*changes):
    """A copy of k-space; each change is a slice, and the value of one position or, of 0, all."""
    kspace = KSPACE.copy()
    for index, value in changes:
        if value == 0:
            kspace[index] = 0
        else:
            kspace[index, 1, 2, 3] = value
    return kspace


@pytest.mark.parametrize("value", [0, np.nan, np.inf, complex(1, -np.inf)])
@pytest.mark.parametrize("index", [0, 2, SLICES - 1])
def test_a_slice_that_cannot_be_used_is_left_out_and_named(tmp_path, index, value):
    file = written(tmp_path / "scan.h5", spoilt((index, value)))
    found = examined(SliceDataset([file]))
    kept = [k for k in range(SLICES) if k != index]
    assert [one.index for one in found.slices] == kept
    (remark,) = found.remarks
    assert remark.startswith(f"Left out {file.path}")
    assert f"slice {index} " in remark
    assert file.middle_slice().index == (2 if index != 2 else 1)


def test_a_slice_whose_reference_is_not_finite_is_no_example(tmp_path):
    reference = np.ones((SLICES, ROWS, COLUMNS), np.float32)
    reference[1, 0, 0] = np.nan
    file = written(tmp_path / "scan.h5", reconstruction_rss=reference)
    assert len(examined(SliceDataset([file])).slices) == SLICES - 1
    assert len(examined(SliceDataset([file]), full=False).slices) == SLICES


def test_a_volume_without_any_slice_is_refused(tmp_path):
    file = written(tmp_path / "scan.h5", spoilt(*((k, [0, np.nan][k % 2]) for k in range(SLICES))))
    with pytest.raises(UnusableSliceError, match=r"scan.h5: kspace must be finite, slice 3 holds"):
        examined(SliceDataset([file]))
    with pytest.raises(UnusableSliceError, match=r"scan.h5"):
        file.middle_slice()


def test_other_faults_of_a_file_are_no_slices_to_leave_out(tmp_path):
    kspace = KSPACE * (np.arange(COLUMNS) % 2)
    with pytest.raises(InputError, match="fully sampled k-space was needed") as refusal:
        examined(SliceDataset([written(tmp_path / "scan.h5", kspace)]))
    assert not isinstance(refusal.value, UnusableSliceError)


@pytest.mark.parametrize("factor", [1e20, 1e30, 1e-20, 1e-30, 3.0])
def test_values_of_any_size_are_brought_to_where_squares_are_finite(tmp_path, factor):
    images = rss(ifft2c(torch.from_numpy(KSPACE).to(torch.complex128))).numpy()
    file = written(
        tmp_path / "scan.h5", KSPACE * np.float32(factor), reconstruction_rss=images * factor
    )
    one = file.read_slice(1)
    assert (one.unit == 1) == (factor == 3.0)
    assert np.log2(one.unit) == round(np.log2(one.unit))  # no digit is lost
    expected = torch.from_numpy(KSPACE[1].astype(complex) * factor / one.unit)
    torch.testing.assert_close(one.kspace.to(expected.dtype), expected, rtol=1e-6, atol=0)
    assert 0.01 < float(one.reference.max()) < 100
    assert one.max * one.unit == pytest.approx(float(images.max() * factor), rel=1e-6)
    torch.testing.assert_close(rss(ifft2c(one.kspace)), one.reference, rtol=1e-4, atol=1e-6)


def zeroed(which):
    mask = torch.ones(24, 64, dtype=torch.bool)
    if which == "random":
        mask = CartesianRandom(3.0, 0.1).mask((24, 64), torch.Generator().manual_seed(0))
    elif which == "points":
        mask = PoissonDisc(3, 8).mask((24, 64), torch.Generator().manual_seed(0))
    elif which == "every second":
        mask[:, 1::2] = False
    elif which == "half":
        mask[:, :32] = False
    elif which == "one column":
        mask[:, 40] = False
    elif which == "one position":
        mask[20, 3] = False
    return mask


@pytest.mark.parametrize(
    "which", ["random", "points", "every second", "half", "one column", "one position"]
)
def test_zeros_without_a_mask_are_not_measured_and_said(tmp_path, which):
    mask = zeroed(which)
    kspace = kspace_of(coil_images(1, COILS, 24, 64)) * mask
    one = written(tmp_path / "scan.h5", kspace.numpy()).read_slice(0)
    assert torch.equal(one.measured, mask)
    columns = int((~mask.any(0)).sum())
    whole = columns * 24 == int((~mask).sum())
    what = f"{columns} of 64 columns" if whole else f"{int((~mask).sum())} of 1536 positions"
    assert one.remarks == (f"{what} are zero in all coils and count as not measured",)
    with pytest.raises(InputError, match=rf"scan.h5: fully sampled .* of slice 0 {what} are zero"):
        fully_sampled(one)


def test_zeros_within_the_mask_of_a_file_are_not_measured_either(tmp_path):
    kspace = KSPACE.copy()
    kspace[..., 7] = 0
    stated = np.arange(COLUMNS) > 1
    one = written(tmp_path / "scan.h5", kspace, mask=stated).read_slice(0)
    assert one.mask[0].tolist() == stated.tolist()
    assert one.measured[0].tolist() == [False] * 2 + [True] * 5 + [False] + [True] * 2
    assert one.remarks == ("1 of 10 columns are zero in all coils and count as not measured",)


@pytest.mark.parametrize("padding", [(3, 3), (8, 0), (0, 5)])
def test_zeros_around_most_of_kspace_are_padding(tmp_path, padding):
    """As fastMRI pads 322 columns to 368: nothing is missing within."""
    kspace = kspace_of(coil_images(1, COILS, 24, 40))
    kspace[..., : padding[0]] = 0
    kspace[..., 40 - padding[1] :] = 0
    one = written(tmp_path / "scan.h5", kspace.numpy()).read_slice(0)
    found, reference = fully_sampled(one)
    torch.testing.assert_close(reference, rss(ifft2c(found)))
    assert int((~one.measured[0]).sum()) == sum(padding)
    assert len(one.remarks) == 1


def phantom():
    return VolumeFile(bundled_scan_path()).read_slice(0).kspace


@pytest.mark.parametrize(("shift", "axis"), [(40, 1), (-40, 1), (60, 0), (80, 1), (80, 0)])
def test_a_peak_elsewhere_is_noticed(shift, axis):
    kspace = torch.roll(phantom(), shift, 1 + axis)
    with pytest.raises(InputError, match="here: k-space has its peak near row") as refusal:
        check_centre(kspace, None, "here")
    place = [80, 80]
    place[axis] = (80 + shift) % 160
    found = re.search(r"near row (\d+) and column (\d+),", str(refusal.value))
    assert [int(one) for one in found.groups()] == pytest.approx(place, abs=2)


def test_kspace_that_was_never_shifted_is_noticed():
    image = ifft2c(phantom())
    with pytest.raises(InputError, match="its zero frequency was to be at 80 and 80"):
        check_centre(torch.fft.fft2(image), None, "here")


@pytest.mark.parametrize("seed", range(8))
def test_noise_spikes_and_slopes_of_phase_are_no_other_centre(seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, 40 + seed, 60, dtype=torch.complex64, generator=generator)
    check_centre(noise, None, "noise")
    kspace = phantom()
    kspace[:, 3 + seed, 150] = 1e6 * kspace.abs().max()  # a spike of the radio frequency
    check_centre(kspace, None, "spike")
    check_centre(torch.roll(phantom(), (seed, -seed), (1, 2)), None, "slope of the phase")
    mask = CartesianRandom(4.0, 0.08).mask((160, 160), generator)
    check_centre(phantom() * mask, mask, "undersampled")
    check_centre(fft2c(torch.ones(1, 8, 8)), None, "too small to tell")


@pytest.mark.parametrize("factor", [1e3, 1e24, 1e37])
def test_a_value_that_no_scan_has_makes_a_slice_unusable(tmp_path, factor):
    """As altered bytes do; the image would show nothing else."""
    kspace = torch.stack([phantom(), phantom()])
    kspace /= kspace.abs().max()
    kspace[1, 0, 30, 141] = factor
    volume = written(tmp_path / "scan.h5", kspace.numpy())
    assert torch.equal(volume.read_slice(0).kspace, kspace[0])
    with pytest.raises(
        UnusableSliceError, match=r"slice 1 holds .* row 30 and column 141, .* near"
    ):
        volume.read_slice(1)
    check_beyond(phantom() * (torch.arange(160) % 3 == 0), "without the centre")
    check_beyond(torch.randn(2, 40, 40, dtype=torch.complex64), "noise")


@pytest.mark.parametrize("shape", [(24, 40), (23, 41), (24, 41)])
def test_padding_is_no_measurement_that_a_training_sees_however_it_is_flipped(tmp_path, shape):
    kspace = kspace_of(coil_images(1, COILS, *shape))
    kspace[..., :5] = 0
    kspace[..., 21:, :] = 0
    one = written(tmp_path / "scan.h5", kspace.numpy()).read_slice(0)
    seen = set()
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        example = draw_full(one, generator, (CartesianRandom(1.01, 0.9),))
        largest = fft2c(example.target).abs().amax(0)
        assert float(largest[example.mask].min()) > 1e-4
        seen.add(tuple(example.mask.any(0).tolist()))
    assert len(seen) >= 2
