"""Writers of scans in the formats that the MRI application only reads."""

import ismrmrd
import numpy as np
import torch

from applications.mri.physics.operators import fft2c

HEADER = """<?xml version="1.0"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
 <measurementInformation><patientPosition>HFS</patientPosition>
  <protocolName>AXT2</protocolName></measurementInformation>
 <experimentalConditions><H1resonanceFrequency_Hz>127740000</H1resonanceFrequency_Hz>
 </experimentalConditions>
 <encoding>
  <encodedSpace><matrixSize><x>{x}</x><y>{y}</y><z>{z}</z></matrixSize>
   <fieldOfView_mm><x>{x_mm}</x><y>{y_mm}</y><z>{z_mm}</z></fieldOfView_mm></encodedSpace>
  <reconSpace><matrixSize><x>{shown_x}</x><y>{shown_y}</y><z>1</z></matrixSize>
   <fieldOfView_mm><x>{shown_x_mm}</x><y>{shown_y_mm}</y><z>{z_mm}</z></fieldOfView_mm></reconSpace>
  <encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>{last}</maximum>
   <center>{centre}</center></kspace_encoding_step_1></encodingLimits>
  <trajectory>{trajectory}</trajectory>
  <parallelImaging><accelerationFactor><kspace_encoding_step_1>2</kspace_encoding_step_1>
   <kspace_encoding_step_2>1</kspace_encoding_step_2></accelerationFactor>
   <calibrationMode>{calibration}</calibrationMode></parallelImaging>
 </encoding>
</ismrmrdHeader>"""


STRAIGHT = np.eye(3)


def coil_images(*shape, seed=0):
    """Complex images that no flip, transposition or shift leaves as they are."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(*shape, dtype=torch.complex128, generator=generator)
    rows, columns = shape[-2:]
    images[..., : rows // 3, : columns // 2] += 3
    images[..., rows // 2, columns // 5] += 9
    return images


def kspace_of(images):
    return fft2c(images).to(torch.complex64)


def header(shape, **changes):
    """Of k-space ``(rows, columns)``, its readout oversampled twice; voxels of 2 x 1.5 x 4 mm."""
    rows, columns = shape
    sizes = {"x": rows, "y": columns, "z": 1, "shown_x": rows // 2, "shown_y": columns}
    views = {"x_mm": 2 * rows, "y_mm": 1.5 * columns, "z_mm": 4}
    views |= {"shown_x_mm": rows, "shown_y_mm": 1.5 * columns}
    rest = {"last": columns - 1, "centre": columns // 2}
    rest |= {"trajectory": "cartesian", "calibration": "embedded"}
    return HEADER.format(**(sizes | views | rest | changes))


def line(samples, flags=(), directions=STRAIGHT, position=(0, 0, 0), **fields):
    """An acquisition of ``(coils, samples)``; counters are fields too."""
    one = ismrmrd.Acquisition.from_array(np.ascontiguousarray(samples, np.complex64))
    one.center_sample = samples.shape[1] // 2
    for name, direction in zip(("read_dir", "phase_dir", "slice_dir"), directions, strict=True):
        setattr(one, name, tuple(direction))
    one.position = tuple(position)
    for flag in flags:
        one.set_flag(flag)
    for name, value in fields.items():
        setattr(one.idx if hasattr(one.idx, name) else one, name, value)
    return one


def lines_of(kspace, columns=None, **fields):
    """The lines of a slice ``(coils, rows, columns)``, outermost first."""
    columns = range(kspace.shape[-1]) if columns is None else columns
    return [
        line(kspace[:, :, column].numpy(), kspace_encode_step_1=column, **fields)
        for column in reversed(list(columns))
    ]


def write_ismrmrd(path, lines, xml, group="dataset"):
    with ismrmrd.Dataset(path, group, mode="a") as file:
        file.write_xml_header(xml.encode())
        for one in lines:
            file.append_acquisition(one)
    return path


def write_cfl(base, values):
    """Of an array with BART's axes in their order."""
    sizes = [*values.shape, *[1] * (16 - values.ndim)]
    base.with_name(base.name + ".hdr").write_text(f"# Dimensions\n{' '.join(map(str, sizes))}\n")
    stored = np.asarray(values, "<c8").ravel(order="F")
    base.with_name(base.name + ".cfl").write_bytes(stored.tobytes())
    return base


def as_bart(kspace):
    """``(slices, coils, rows, columns)`` to the axes 1, PHS1, PHS2, COIL, ..., SLICE."""
    values = kspace.permute(2, 3, 1, 0).numpy()[None]  # 1, rows, columns, coils, slices
    return values.reshape(*values.shape[:4], *[1] * 9, values.shape[4])
