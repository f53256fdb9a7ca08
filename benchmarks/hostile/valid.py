"""A small valid file of every kind that the applications read, drawn at random."""

import gzip
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import h5py
import ismrmrd
import nibabel
import numpy as np
import torch
from numpy.random import Generator
from twixtools import mdh_def

import bilevel as bl
from applications.mri.formats.fastmri_header import minimal_header
from applications.mri.network.architecture import light, paper
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained, save_weights

N = 16  # rows and columns


def kspace_of(rng: Generator, *shape: int) -> np.ndarray:
    """Random images' k-space, its peak in the middle."""
    values = rng.normal(size=(*shape, 2)).view(complex)[..., 0]
    values[..., shape[-2] // 2, shape[-1] // 2] += 50
    return values.astype(np.complex64)


def fastmri(folder: Path, rng: Generator) -> Path:
    path = folder / "scan.h5"
    slices, coils = rng.integers(1, 4, size=2)
    values = kspace_of(rng, slices, coils, N, N)
    layout = rng.integers(5)
    packed = {"chunks": True, "compression": "gzip"} if rng.integers(2) else {}
    with h5py.File(path, "w") as file:
        if layout == 1:  # pairs
            values = np.stack([values.real, values.imag], -1)
        elif layout == 2:  # averages
            values = np.stack([values, values])
        elif layout == 3:  # one coil
            values = values[:, 0]
        elif layout == 4:  # records
            records = np.zeros(values.shape, [("real", "f4"), ("imag", "f4")])
            records["real"], records["imag"] = values.real, values.imag
            values = records
        file.create_dataset("kspace", data=values, **packed)
        if rng.integers(2):
            shape = [(N,), (N, N), (slices, N), (slices, N, N)][rng.integers(4)]
            file["mask"] = np.ones(shape, [bool, np.uint8, np.float32][rng.integers(3)])
        if rng.integers(2):
            file["reconstruction_rss"] = rng.random((slices, N, N)).astype(np.float32)
            file.attrs["max"] = 1.0
        header = minimal_header((N, N), (N, N))
        file.create_dataset("ismrmrd_header", data=header, dtype=h5py.string_dtype())
        file.attrs["acquisition"] = "AXT2"
        file.attrs["patient_id"] = "simulated"
    return path


def m4raw(folder: Path, rng: Generator) -> Path:
    values = kspace_of(rng, 2, 2, N, N)
    for k in (1, 2):
        with h5py.File(folder / f"scan{k:02}.h5", "w") as file:
            file["kspace"] = values * k
    return folder / "scan"


def ismrmrd_xml() -> str:
    """A header whose readout is oversampled twice."""
    return minimal_header((2 * N, N), (N, N))


def ismrmrd_file(folder: Path, rng: Generator, xml: str | bytes | None = None) -> Path:
    path, coils = folder / "scan.mrd", 2
    values = kspace_of(rng, coils, 2 * N, N)
    kind = np.dtype(
        [
            ("head", ismrmrd.hdf5.acquisition_header_dtype),
            ("traj", h5py.vlen_dtype(np.float32)),
            ("data", h5py.vlen_dtype(np.float32)),
        ]
    )
    lines = np.zeros(N, kind)
    for column in range(N):
        head = lines["head"][column]
        head["number_of_samples"], head["active_channels"] = 2 * N, coils
        head["center_sample"], head["idx"]["kspace_encode_step_1"] = N, column
        for k, name in enumerate(("read_dir", "phase_dir", "slice_dir")):
            head[name] = np.eye(3)[k]
        lines["traj"][column] = np.zeros(0, np.float32)
        line = np.ascontiguousarray(values[:, :, column])
        lines["data"][column] = line.view(np.float32).reshape(-1)
    with h5py.File(path, "w") as file:
        group = file.create_group("dataset")
        group.create_dataset("data", data=lines, chunks=(8,), maxshape=(None,))
        text = ismrmrd_xml() if xml is None else xml
        text = text.encode() if isinstance(text, str) else text
        group.create_dataset("xml", data=np.array([text], object), dtype=h5py.string_dtype())
    return path


def bart(folder: Path, rng: Generator) -> Path:
    values = np.moveaxis(kspace_of(rng, 2, N, N), 0, -1)
    sizes = [1, N, N, 2, *[1] * 12]
    (folder / "scan.hdr").write_text(f"# Dimensions\n{' '.join(map(str, sizes))}\n")
    (folder / "scan.cfl").write_bytes(values.ravel(order="F").astype("<c8").tobytes())
    return folder / ["scan.hdr", "scan.cfl"][rng.integers(2)]


def nifti(folder: Path, rng: Generator) -> Path:
    kind = [np.uint8, np.int16, np.float32][rng.integers(3)]
    values = (100 * rng.random((N, N, 4))).astype(kind)
    image = [nibabel.Nifti1Image, nibabel.Nifti2Image][rng.integers(2)](values, np.eye(4))
    path = folder / ["image.nii", "image.nii.gz"][rng.integers(2)]
    content = image.to_bytes()
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


PROTOCOL = "\n".join(
    [
        "### ASCCONV BEGIN ###",
        'tProtocolName = "gre"',
        f"sKSpace.lBaseResolution = {N}",
        f"sKSpace.lPhaseEncodingLines = {N}",
        "sKSpace.ucTrajectory = 0x1",
        "sKSpace.ucDimension = 0x2",
        "sSliceArray.asSlice[0].dReadoutFOV = 200.0",
        "sSliceArray.asSlice[0].dPhaseFOV = 200.0",
        "sSliceArray.asSlice[0].dThickness = 5.0",
        "sPat.ucRefScanMode = 0x1",
        "### ASCCONV END ###\n",
    ]
)


def twix(folder: Path, rng: Generator, protocol: str = PROTOCOL) -> Path:
    path, coils, modern = folder / "meas.dat", 2, bool(rng.integers(2))
    values = kspace_of(rng, coils, 2 * N, N)
    parts = b"".join(
        name + b"\0" + len(text).to_bytes(4, "little") + text
        for name, text in ((b"Config", b"x = 1\n"), (b"MeasYaps", protocol.encode("latin1")))
    )
    length = max(8 + len(parts) + 32, 0 if modern else 10240)  # by which versions are told apart
    header = (struct.pack("<II", length, 2) + parts).ljust(length, b"\0")
    kind = mdh_def.Scan_header if modern else mdh_def.VB17_header
    blocks = []
    for column in range(N):
        head = kind()
        head.SamplesInScan, head.UsedChannels, head.CenterCol = 2 * N, coils, N
        head.CenterLin, head.Counter.Lin = N // 2, column
        lines = [values[c, :, column].astype("<c8").tobytes() for c in range(coils)]
        if modern:
            channel = bytes(mdh_def.Channel_header())
            blocks.append(bytes(head) + b"".join(channel + line for line in lines))
        else:
            blocks.append(b"".join(bytes(head) + line for line in lines))
    end = kind()
    mdh_def.add_flag(end, "ACQEND")
    n_end = len(bytes(end)) + 160
    end.FlagsAndDMALength = n_end
    blocks.append(bytes(end) + b"\0" * 160)
    scan = header + b"".join(blocks)
    if modern:
        entry = struct.pack("<IIQQ", 1, 1, 10240, len(scan)) + b"\0" * 128
        scan = (struct.pack("<II", 0, 1) + entry).ljust(10240, b"\0") + scan
    path.write_bytes(scan)
    return path


def mask(folder: Path, rng: Generator) -> Path:
    values = rng.random((N, N)) < 0.5
    values[0, 0] = True
    suffix = ["npy", "npz", "h5", "png", "cfl"][rng.integers(5)]
    path = folder / f"mask.{suffix}"
    if suffix == "npy":
        np.save(path, values)
    elif suffix == "npz":
        [np.savez, np.savez_compressed][rng.integers(2)](path, mask=values)
    elif suffix == "h5":
        with h5py.File(path, "w") as file:
            file["mask"] = values
    elif suffix == "png":
        from PIL import Image

        Image.fromarray((255 * values).astype(np.uint8)).save(path)
    else:
        (folder / "mask.hdr").write_text(f"# Dimensions\n{N} {N} {' '.join(['1'] * 14)}\n")
        path.write_bytes(values.ravel(order="F").astype("<c8").tobytes())
    return path


TASKS = """# tasks
defaults: {acceleration: 4, coils: 4, roles: train+validation}
tasks:
  - {name: head, anatomy: brain_t1_axial, noise: 0.01, seed: 3}
  - name: skull
    anatomy: skull_base_t1_axial
    mask: poisson
    acceleration: 8
    calibration: 24
    repeats: 2
    roles: [train, test]
"""


def tasks(folder: Path, rng: Generator) -> Path:
    path = folder / "tasks.yaml"
    path.write_text(TASKS)
    return path


@cache
def networks() -> tuple[Network, ...]:
    """Small ones."""
    small = {"n_phases": 2, "filters": 3, "features": 2, "feature_kernel": 3}
    return (
        Network(replace(paper(2), **small)),
        Network(replace(light(), n_phases=2, gains=3, warm_up=3)),
    )


def weights(folder: Path, rng: Generator) -> Path:
    path, network = folder / "weights.safetensors", networks()[rng.integers(2)]
    save_weights(path, Trained(network, network.controls(), {"steps": 3}))
    return path


def kept_run(folder: Path, steps: int, *, resume: bool) -> bl.control.ControlSolution:
    """A descent that is kept in a folder."""
    problem = bl.ControlProblem(
        bl.Map(lambda state, control, t: state + control),
        terminal=lambda state, control: state**2 / 2 + control**2,
        horizon=3,
    )
    solver, start = bl.ControlSolver(problem), (torch.tensor(0.0), torch.tensor(4.0))
    return solver.solve(*start, steps=steps, keep=bl.Keep(folder, every=1), resume=resume)


def state(folder: Path, rng: Generator) -> Path:
    kept_run(folder, 2, resume=False)
    return max(folder.glob("*.safetensors"))


def results(folder: Path, rng: Generator) -> Path:
    run = {"ablation": "matrix", "seed": 0, "correlation": {"a": {"v": 0.25}, "b": {"v": 0.75}}}
    path = folder / "results.json"
    path.write_text(json.dumps({"runs": [run], "validation": ["v"], "summary": {}}))
    return path


def idx(folder: Path, rng: Generator) -> Path:
    images = rng.integers(0, 255, size=(6, 4, 4), dtype=np.uint8)
    labels = np.arange(6, dtype=np.uint8) % 3
    suffix = ["", ".gz"][rng.integers(2)]
    for name, values in (("images-idx3", images), ("labels-idx1", labels)):
        content = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
        content += values.tobytes()
        content = gzip.compress(content, 1) if suffix else content
        (folder / f"train-{name}-ubyte{suffix}").write_bytes(content)
    names = ["images-idx3", "labels-idx1"]
    return folder / f"train-{names[rng.integers(2)]}-ubyte{suffix}"


def anatomies(folder: Path, rng: Generator) -> Path:
    path = folder / "anatomy.h5"
    with h5py.File(path, "w") as file:
        for name in ("head", "neck"):
            images = rng.integers(0, 255, size=(3, N, N), dtype=np.uint8)
            file.create_dataset(f"{name}/images", data=images, compression="gzip")
            file[name].attrs["wrap"] = 0.5
    return path


KINDS: dict[str, Callable[[Path, Generator], Path]] = {
    "fastMRI": fastmri,
    "M4Raw": m4raw,
    "ISMRMRD": ismrmrd_file,
    "BART": bart,
    "NIfTI": nifti,
    "TWIX": twix,
    "mask": mask,
    "YAML": tasks,
    "weights": weights,
    "state": state,
    "results": results,
    "IDX": idx,
    "anatomies": anatomies,
}
