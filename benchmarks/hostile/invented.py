"""Files that somebody made up to do harm: doors to other files, bombs, and lies about sizes.

None of them may be accepted, but those of `HARMLESS`.
"""

import gzip
import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import h5py
import numpy as np
from numpy.random import Generator

from benchmarks.hostile import valid
from benchmarks.hostile.valid import N

Inventor = Callable[[Path, Generator], Path]
SECRET = "secret.bin"  # beside the folder, in which nobody may look


def _secret(folder: Path) -> Path:
    path = folder.parent / f"{folder.name}-{SECRET}"
    if not path.exists():
        path.write_bytes(np.ones(4 * N * N, np.complex64).tobytes())
        with h5py.File(path.with_suffix(".h5"), "w") as file:
            file["kspace"] = np.ones((1, 2, N, N), np.complex64)
            file["images"] = np.ones((1, N, N), np.uint8)
    return path


def _hdf5(change: Callable[[h5py.File, Path, Generator], None], kind: str = "fastMRI") -> Inventor:
    def invent(folder: Path, rng: Generator) -> Path:
        path = valid.KINDS[kind](folder, rng)
        with h5py.File(path, "a") as file:
            change(file, _secret(folder), rng)
        return path

    return invent


def _again(file: h5py.File, name: str) -> None:
    if name in file:
        del file[name]


def _external_link(file: h5py.File, secret: Path, rng: Generator) -> None:
    name = ["kspace", "mask", "reconstruction_rss", "ismrmrd_header"][rng.integers(4)]
    _again(file, name)
    file[name] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "/kspace")


def _link_by_way(file: h5py.File, secret: Path, rng: Generator) -> None:
    _again(file, "kspace")
    file["door"] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "/")
    file["kspace"] = h5py.SoftLink("/door/kspace")


def _circle(file: h5py.File, secret: Path, rng: Generator) -> None:
    _again(file, "kspace")
    file["kspace"], file["other"] = h5py.SoftLink("/other"), h5py.SoftLink("/kspace")


def _external_storage(file: h5py.File, secret: Path, rng: Generator) -> None:
    _again(file, "kspace")
    shape = (1, 2, N, N)
    n_bytes = 8 * int(np.prod(shape))
    file.create_dataset("kspace", shape, "c8", external=[(str(secret), 0, n_bytes)])


def _virtual(file: h5py.File, secret: Path, rng: Generator) -> None:
    _again(file, "kspace")
    shape = (1, 2, N, N)
    layout = h5py.VirtualLayout(shape, "c8")
    layout[:] = h5py.VirtualSource(str(secret.with_suffix(".h5")), "kspace", shape)
    file.create_virtual_dataset("kspace", layout)


def _virtual_self(file: h5py.File, secret: Path, rng: Generator) -> None:
    _again(file, "kspace")
    shape = (2, 2, N, N)
    layout = h5py.VirtualLayout(shape, "c8")
    layout[:] = h5py.VirtualSource(".", "kspace", shape)
    file.create_virtual_dataset("kspace", layout)


def _announced(file: h5py.File, secret: Path, rng: Generator) -> None:
    _again(file, "kspace")
    shapes = [(10**12, 1, 1, 1), (1, 1, 10**6, 10**6), (1, 10**12, 1, 1), (10**6, 10**6, 1, 1)]
    shape = shapes[rng.integers(4)]
    chunks = tuple(min(64, n) for n in shape)
    file.create_dataset("kspace", shape, "c8", chunks=chunks)


def _announced_mask(file: h5py.File, secret: Path, rng: Generator) -> None:
    _again(file, "mask")
    file.create_dataset("mask", (10**6, 10**6), "u1", chunks=(64, 64), fillvalue=1)


def _announced_reference(file: h5py.File, secret: Path, rng: Generator) -> None:
    _again(file, "reconstruction_rss")
    file.attrs.pop("max", None)
    n = file["kspace"].shape[0]
    file.create_dataset("reconstruction_rss", (n, 10**6, 10**6), "f4", chunks=(1, 64, 64))


def _packed(file: h5py.File, secret: Path, rng: Generator) -> None:
    _again(file, "kspace")
    shape = (1, 8, 2048, 2048)
    file.create_dataset("kspace", shape, "c8", chunks=(1, 1, 1024, 1024), compression="gzip")
    file["kspace"][0, 0, :1024, :1024] = 0


def _large_chunk(file: h5py.File, secret: Path, rng: Generator) -> None:
    _again(file, "kspace")
    side = 20_000
    file.create_dataset(
        *("kspace", (1, 1, N, N), "c8"), maxshape=(1, 1, side, side), chunks=(1, 1, side, side)
    )


def _odd_type(file: h5py.File, secret: Path, rng: Generator) -> None:
    _again(file, "kspace")
    shape = (1, 2, N, N)
    kinds = ["S8", h5py.vlen_dtype(np.complex64), h5py.string_dtype(), h5py.ref_dtype]
    kinds += [np.dtype([("r", "f4"), ("i", "S4")]), np.dtype("i8"), np.dtype("?"), np.dtype("V8")]
    file.create_dataset("kspace", shape, kinds[rng.integers(len(kinds))])


def _odd_shape(file: h5py.File, secret: Path, rng: Generator) -> None:
    _again(file, "kspace")
    shapes = [(), (0,), (N,), (1, 0, N, N), (1,) * 6, (1, 0, 2)]
    which = rng.integers(len(shapes) + 2)
    if which == len(shapes):
        file.create_group("kspace")
    elif which > len(shapes):
        file["kspace"] = h5py.Empty("c8")
    else:
        file.create_dataset("kspace", shapes[which], "c8")


def _odd_maximum(file: h5py.File, secret: Path, rng: Generator) -> None:
    _again(file, "reconstruction_rss")
    file["reconstruction_rss"] = np.ones((file["kspace"].shape[-4 % 3], N, N), np.float32)
    file.attrs["max"] = [np.nan, np.inf, -1.0, -np.inf][rng.integers(4)]


def _external_images(file: h5py.File, secret: Path, rng: Generator) -> None:
    del file["head"]["images"]
    file["head"]["images"] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "/images")


def _announced_images(file: h5py.File, secret: Path, rng: Generator) -> None:
    del file["head"]["images"]
    file["head"].create_dataset("images", (10**4, 10**4, 10**4), "u1", chunks=(1, 64, 64))


def _external_scan(file: h5py.File, secret: Path, rng: Generator) -> None:
    del file["dataset"]["xml"]
    file["dataset"]["xml"] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "/kspace")


def _announced_scan(file: h5py.File, secret: Path, rng: Generator) -> None:
    file["dataset"]["data"].resize((10**11,))


_TEXT = valid.ismrmrd_xml()
_LAUGHS = "".join(f'<!ENTITY a{k} "{f"&a{k - 1};" * 10}">' for k in range(1, 12))
XMLS = (
    _TEXT.replace("?>", '?><!DOCTYPE x [<!ENTITY s SYSTEM "file:///etc/passwd">]>', 1).replace(
        "cartesian", "&s;"
    ),
    _TEXT.replace("?>", f'?><!DOCTYPE x [<!ENTITY a0 "ha">{_LAUGHS}]>', 1).replace(
        "cartesian", "&a11;"
    ),
    _TEXT.replace("<encoding>", "<a>" * 20_000 + "<encoding>"),
    _TEXT.replace(f"<x>{2 * N}</x>", "<x>1000000000</x>"),
    _TEXT.replace(f"<x>{2 * N}</x>", "<x>-5</x>"),
    _TEXT.replace(f"<x>{2 * N}</x>", "<x>nan</x>"),
    _TEXT.replace(f"<x>{N}</x>", "<x>0</x>"),
    _TEXT.replace(f"<y>{N}</y>", "<y>INF</y>"),
    _TEXT.replace("cartesian", "spiral"),
    "",
    "\1" * 100,
    "<a/>",
    "x" * 5_000_000,
)


def _xml(folder: Path, rng: Generator) -> Path:
    return valid.ismrmrd_file(folder, rng, XMLS[rng.integers(len(XMLS))])


def _xml_other_encoding(folder: Path, rng: Generator) -> Path:
    text = XMLS[0].replace("utf-8", "utf-16")
    path = valid.fastmri(folder, rng)
    with h5py.File(path, "a") as file:
        del file["ismrmrd_header"]
        file["ismrmrd_header"] = np.void(text.encode("utf-16"))
        file["kspace"].attrs["x"] = 1
        _again(file, "mask")
        file["mask"] = np.full(3, 7)
    return path


def _bart_sizes(folder: Path, rng: Generator) -> Path:
    path = valid.bart(folder, rng)
    sizes = [f"{10**12} 1", f"1 {10**6} {10**6}", "9" * 6000, "-1 -1", "1 " * 50, "2 3", "nan"]
    text = f"# Dimensions\n{sizes[rng.integers(len(sizes))]}\n"
    (folder / "scan.hdr").write_text(text)
    return path


def _bart_sparse(folder: Path, rng: Generator) -> Path:
    path = valid.bart(folder, rng)
    sizes = [[1, 1024, 1024, 128, 1, 1, 1, 1, 1, 1, 1, 1, 1, 64], [1, N, N, *[1] * 7, 10**6]]
    chosen = sizes[rng.integers(2)]
    (folder / "scan.hdr").write_text(f"# Dimensions\n{' '.join(map(str, chosen))}\n")
    with (folder / "scan.cfl").open("wb") as file:
        file.truncate(8 * int(np.prod(chosen, dtype=object)))
    return path


def _nifti_lies(folder: Path, rng: Generator) -> Path:
    path = valid.nifti(folder, rng)
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    at, form = (40, "<8h") if content[:2] == b"\x5c\x01" else (16, "<8q")
    most = 32767 if form == "<8h" else 2**62
    sides = [
        (3, most, most, most),
        (7, most, most, most),
        (3, -5, 4, 4),
        (0, 1, 1, 1),
        (9, 1, 1, 1),
    ]
    chosen = sides[rng.integers(len(sides))]
    axes = struct.pack(form, *chosen, *[most if chosen[0] == 7 else 1] * 4)
    content = content[:at] + axes + content[at + len(axes) :]
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


def _nifti_numbers(folder: Path, rng: Generator) -> Path:
    import nibabel

    values = np.ones((N, N, 4), np.float32)
    spoilt = [np.nan, np.inf, -1.0]
    values[3, 3, 1] = spoilt[rng.integers(3)]
    path = folder / "image.nii"
    path.write_bytes(nibabel.Nifti1Image(values, np.eye(4)).to_bytes())
    return path


def _nifti_voxels(folder: Path, rng: Generator) -> Path:
    import nibabel

    image = nibabel.Nifti1Image(np.ones((N, N, 4), np.float32), np.eye(4))
    content = bytearray(image.to_bytes())
    value = [0.0, np.nan, 1e30, np.inf, 1e-30][rng.integers(5)]
    content[80:84] = struct.pack("<f", value)  # of the first axis
    path = folder / "image.nii"
    path.write_bytes(bytes(content))
    return path


@cache
def _packed_zeros(n_mib: int) -> bytes:
    """Gzip of so many MiB of zeros, a thousandth as large; made piece by piece, and once."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    piece = bytes(2**20)
    return b"".join(packer.compress(piece) for _ in range(n_mib)) + packer.flush()


def _nifti_bomb(folder: Path, rng: Generator) -> Path:
    path = folder / "image.nii.gz"
    path.write_bytes(_packed_zeros(150))
    return path


def _idx_bomb(folder: Path, rng: Generator) -> Path:
    valid.idx(folder, rng)
    for one in folder.iterdir():
        one.unlink()
    head = bytes([0, 0, 8, 3]) + struct.pack(">3I", 10**6, 1000, 1000)
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(head) + _packed_zeros(150))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(_packed_zeros(150))
    return path


def _idx_lies(folder: Path, rng: Generator) -> Path:
    for part, n_axes in (("images-idx3", 3), ("labels-idx1", 1)):
        head = bytes([0, 0, 8, n_axes]) + struct.pack(f">{n_axes}I", *[2**32 - 1] * n_axes)
        (folder / f"train-{part}-ubyte").write_bytes(head + b"\1" * 16)
    return folder / "train-images-idx3-ubyte"


def _npy(shape: str, kind: str = "'|b1'") -> bytes:
    text = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


NPYS = (
    _npy("(1000000, 1000000)"),
    _npy("(1000000000000,)", "'<c16'"),
    _npy("(-1, 5)"),
    _npy("(2, 2)", "'|O'") + b"cos\nsystem\n(S'true'\ntR.",
    _npy("(2, 2)", "[('a', '<f8', (100000, 100000))]"),
    _npy("(" * 500),
    _npy("(16, 16)", "'<M8[s]'") + bytes(2048),
    _npy("(4, 4)", "'<f8'") + np.full((4, 4), np.nan).tobytes(),
    b"\x93NUMPY\3\0" + struct.pack("<I", 2**31) + b"{}",
)


def _npy_lies(folder: Path, rng: Generator) -> Path:
    path = folder / "mask.npy"
    path.write_bytes(NPYS[rng.integers(len(NPYS))])
    return path


def _npz_bomb(folder: Path, rng: Generator) -> Path:
    path = folder / "mask.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("mask.npy", "w", force_zip64=True) as file,
    ):
        file.write(_npy("(10000, 15000)"))
        for _ in range(150):
            file.write(bytes(10**6))
    return path


def _npz_pickle(folder: Path, rng: Generator) -> Path:
    path = folder / "mask.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mask.npy", NPYS[3])
        archive.writestr("mask", b"hello")
    return path


def _png_bomb(folder: Path, rng: Generator) -> Path:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    side = [30_000, 2**31 - 1][rng.integers(2)]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(10**6)))
    path = folder / "mask.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b""))
    return path


YAMLS = (
    "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [{f'*a{k - 1}, ' * 10}]\n" for k in range(1, 12)),
    "tasks: &a [*a]\n",
    "tasks: [{name: &n {a: *n}, anatomy: x}]\n",
    "tasks: " + "[" * 20_000,
    "tasks: " + "{a: " * 5_000,
    f"tasks: [{{name: a, anatomy: x, size: {'9' * 6000}}}]\n",
    "tasks: [{name: a, anatomy: x, noise: .nan}]\n",
    "tasks: [{name: a, anatomy: x, noise: .inf}]\n",
    "tasks: [{name: a, anatomy: x, coils: 1000000000}]\n",
    "tasks: [{name: a, anatomy: x, repeats: 1000000000000}]\n",
    "tasks: [{name: a, anatomy: x, size: 2001-99-99}]\n",
    "tasks: !!python/object/apply:os.system [echo]\n",
    "tasks: [!!binary x]\n",
    "tasks: [{name: a, ? [a, b] : c}]\n",
    f"t: &t {'x' * 30_000}\ntasks: [{('{name: [' + '*t, ' * 100 + '], anatomy: x}, ') * 100}]",
    "defaults: &d {a: 1}\n<<: [*d, *d]\ntasks: 5\n",
    "#" + "x" * 200_000,
    "tasks: [" + "{name: a, anatomy: x}, " * 5_000 + "]",
    "\x01\x02\x03",
)


def _yaml(folder: Path, rng: Generator) -> Path:
    path = folder / "tasks.yaml"
    path.write_text(YAMLS[rng.integers(len(YAMLS))])
    return path


def _safetensors(header: object, length: int | None = None, rest: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + rest


def _described(**fields: object) -> dict[str, object]:
    return {"__metadata__": {"architecture": json.dumps({"n_coils": 2} | fields), "record": "{}"}}


TENSORS = (
    _safetensors(_described(filters=10**6)),
    _safetensors(_described(n_phases=10**9)),
    _safetensors(_described(kernel=10**9 + 1)),
    _safetensors(_described(feature_kernel=99_999)),
    _safetensors(_described(n_coils=0, gains=10**7, warm_up=1, scale_input=True)),
    _safetensors(_described(n_coils=0, gains=1, warm_up=10**9, scale_input=True)),
    _safetensors(_described(filters=True)),
    _safetensors(_described(filters=2.0)),
    _safetensors(_described(step=float("nan"))),
    _safetensors(_described(step="1")),
    _safetensors({"__metadata__": {"architecture": "[" * 100_000}}),
    _safetensors({"__metadata__": {"architecture": "9" * 10_000}}),
    _safetensors({"__metadata__": {"training": "{}"}}),
    _safetensors({"__metadata__": {"training": "[]"}}),
    _safetensors({"__metadata__": {"training": '{"architecture": {}, "conditions": 5}'}}),
    _safetensors({"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}),
    _safetensors({"a": {"dtype": "F32", "shape": [2**63, 2], "data_offsets": [0, 0]}}),
    _safetensors({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, rest=b"abcd"),
    _safetensors(b"{}", 2**63),
    _safetensors(b"{" * 50_000),
    b"",
)


def _tensors(folder: Path, rng: Generator) -> Path:
    path = folder / "weights.safetensors"
    path.write_bytes(TENSORS[rng.integers(len(TENSORS))])
    return path


def _signed(folder: Path, rng: Generator) -> Path:
    """A checkpoint that was not written here, and yet has its checksum in its name."""
    path = valid.state(folder, rng)
    content = path.read_bytes()
    texts = [
        "[" * 50_000,
        "5",
        "{}",
        '{"conditions": {}}',
        '{"conditions": 5, "state": 5}',
        "9" * 9999,
    ]
    wanted = {"bilevel checkpoint": texts[rng.integers(len(texts))], "format": "1"}
    made_up = _safetensors({"__metadata__": wanted})
    content = [made_up, content[: len(content) // 2], TENSORS[rng.integers(len(TENSORS))]][
        rng.integers(3)
    ]
    digest = hashlib.sha256(content).hexdigest()[:32]
    for one in folder.glob("*.safetensors"):
        one.unlink()
    path = folder / f"update-000000002-{digest}.safetensors"
    path.write_bytes(content)
    return path


def _results(folder: Path, rng: Generator) -> Path:
    def run(**changes: object) -> dict[str, object]:
        table = {"ablation": "matrix", "seed": 0, "correlation": {"a": {"v": 0.5}}}
        return {"runs": [table | changes], "validation": ["v"]}

    contents = [
        *(b"[" * 100_000, b"9" * 10_000, b"5", b"{}", b"\xff\xfe", b'{"runs": 5, "validation": 5}'),
        *(json.dumps(run(correlation=one)).encode() for one in (5, [], {"a": 5}, {"a": {}})),
        *(json.dumps(run(correlation={"a": {"v": one}})).encode() for one in (None, "x", 1e9, -1)),
        json.dumps(run(correlation={"a": {"v": float("nan")}})).encode(),
        json.dumps(run(seed=[])).encode(),
        json.dumps(run(ablation={})).encode(),
    ]
    path = folder / "results.json"
    path.write_bytes(contents[rng.integers(len(contents))])
    return path


PROTOCOLS = (
    f"sSliceArray.asSlice[{10**9}].dReadoutFOV = 1\n",
    f"sKSpace.lBaseResolution = {'9' * 5000}\n",
    "sKSpace.lBaseResolution = nan\n",
    "sKSpace.lBaseResolution = 0xfffffffff\n",
    "sKSpace.lBaseResolution = -4\n",
    f"sKSpace.lPhaseEncodingLines = {10**8}\n",
    "sKSpace.dPhaseOversamplingForDialog = 1e30\n",
    "sKSpace.dPhaseOversamplingForDialog = -0.9999999\n",
    "sSliceArray.asSlice[0].dReadoutFOV = inf\n",
    "sSliceArray.asSlice[0].dPhaseFOV = -1\n",
    "a" * 100_000 + " = " + "[" * 100_000 + "\n",
)


def _twix_protocol(folder: Path, rng: Generator) -> Path:
    line = PROTOCOLS[rng.integers(len(PROTOCOLS))]
    path = valid.twix(folder, rng, line + ("" if "asSlice[1" in line else valid.PROTOCOL))
    if "aaaa" in line or "asSlice[1" in line:
        path.write_bytes(path.read_bytes()[:-300])
    return path


def _twix_standstill(folder: Path, rng: Generator) -> Path:
    """Blocks of no length, at which a parser that trusts them stands still."""
    path = valid.twix(folder, rng)
    content = bytearray(path.read_bytes())
    place = content.find((2 * N).to_bytes(2, "little") + b"\2\0")
    content[place : place + 4] = b"\0\0\0\0"
    content[place - 8 : place] = (1 << 5).to_bytes(8, "little")  # synchronous data
    content[place - (48 if len(content) % 2 else 28) :][:4] = b"\0\0\0\0"
    begin = max(place - 64, 0)
    content[begin:place] = bytes(place - begin)
    content[place - 8 : place] = (1 << 5).to_bytes(8, "little")
    path.write_bytes(bytes(content))
    return path


def no_file(kind: str) -> Inventor:
    """Something at the place of a file that is none."""

    def invent(folder: Path, rng: Generator) -> Path:
        path = valid.KINDS[kind](folder, rng)
        if not path.exists():
            path = folder / "scan01.h5"
        name = path.name
        for one in folder.iterdir():
            if one.stem == path.stem:
                one.unlink()
        which = rng.integers(7)
        if which == 0:
            os.mkfifo(path)
        elif which == 1:
            path.symlink_to("/dev/zero")
        elif which == 2:
            path.mkdir()
        elif which == 3:
            path.symlink_to(name)
        elif which == 4:
            path.symlink_to("/proc/self/mem")
        elif which == 5:
            path.write_bytes(b"")
        else:
            with path.open("wb") as file:
                file.truncate(2**40)
        return path

    return invent


_HDF5: tuple[Callable[[h5py.File, Path, Generator], None], ...] = (
    *(_external_link, _link_by_way, _circle, _external_storage, _virtual, _virtual_self),
    *(_announced, _announced_mask, _announced_reference, _packed, _large_chunk, _odd_type),
    *(_odd_shape, _odd_maximum),
)
INVENTORS: dict[str, tuple[Inventor, ...]] = {
    "fastMRI": (*map(_hdf5, _HDF5), _xml_other_encoding),
    "M4Raw": (),
    "ISMRMRD": (_xml, _xml, _hdf5(_external_scan, "ISMRMRD"), _hdf5(_announced_scan, "ISMRMRD")),
    "BART": (_bart_sizes, _bart_sparse),
    "NIfTI": (_nifti_lies, _nifti_numbers, _nifti_voxels, _nifti_bomb),
    "TWIX": (_twix_protocol, _twix_standstill),
    "mask": (_npy_lies, _npz_bomb, _npz_pickle, _png_bomb),
    "YAML": (_yaml,),
    "weights": (_tensors,),
    "state": (_signed,),
    "results": (_results,),
    "IDX": (_idx_bomb, _idx_lies),
    "anatomies": (_hdf5(_external_images, "anatomies"), _hdf5(_announced_images, "anatomies")),
}
HARMLESS = {_yaml, _xml}  # some of them are lists and scans like others


def invent(kind: str, folder: Path, rng: Generator) -> tuple[Path, bool]:
    """A file that is made up.

    Args:
        kind: of `valid.KINDS`.
        folder: for it.
        rng: of which.

    Returns:
        The file, and whether it may be accepted.
    """
    known = (*INVENTORS[kind], no_file(kind))
    chosen = known[rng.integers(len(known))]
    return chosen(folder, rng), chosen in HARMLESS
