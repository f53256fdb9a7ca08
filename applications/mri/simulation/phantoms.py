"""Folders of simulated scans from magnitude images of anatomies."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from applications.errors import InputError
from applications.files import make_folder
from applications.mri.data import Volume, write_volume
from applications.mri.formats.hdf5 import opened
from applications.mri.formats.nifti import Plane
from applications.mri.physics.operators import ifft2c, rss
from applications.mri.simulation.anatomy import load_anatomies, resize, split, wraps
from applications.mri.simulation.coils import biot_savart_coils
from applications.mri.simulation.simulate import simulate
from applications.mri.simulation.views import columns_in_view, in_view
from applications.outputs import Kind, Output, check_outputs
from applications.settings import setting

_PATIENT = "simulated"


def _is_simulated(path: Path) -> bool:
    with opened(path) as file:
        return file.attributes["patient_id"] == _PATIENT


SIMULATED = Kind("a simulated scan", _is_simulated)
_MOST = {"n_coils": 1024, "repeats": 10_000, "noise_std": 1e5, "local_phase": 1e5}
_MOST |= {"seed": 2**63 - 1}
REFERENCES = ("clean", "measured")
ROLES = ("train", "validation", "test")


@dataclass(frozen=True)
class SimulationSettings:
    """What to simulate.

    Attributes:
        size: rows and columns of the images, at most those of the anatomies.
        n_coils: receive coils.
        noise_std: of real and imaginary part, in units of image magnitude, see `simulate`.
        repeats: training volumes an anatomy, each with coils, phases and noise of its own.
        seed: of all of it.
        anatomies: HDF5 or NIfTI file of magnitude images; None for the bundled ones.
        plane: of the slices of a NIfTI volume, None for axial ones.
        local_phase: strength of phase true to life, see `simulate`.
        reference: `clean`; or `measured`, the root sum of squares of the noisy images, which is
            what a fully sampled scan has.
        names: of the anatomies to simulate; None: all there are.
        wrap: share of the columns that the field of view has, what lies outside folds over; None:
            as the anatomies state it, most of them 1.
    """

    size: int = setting(128, "Rows and columns.", least=16)
    n_coils: int = setting(8, "Receive coils.", name="coils", least=1)
    noise_std: float = setting(0.01, "Noise in units of image magnitude.", name="noise", least=0)
    repeats: int = setting(1, "Training volumes an anatomy.", least=1)
    seed: int = setting(0, "Of everything that is random.")
    anatomies: Path | None = setting(None, "Magnitude images: NIfTI, or HDF5 of groups.")
    plane: Plane | None = setting(None, "Slices of NIfTI; axial, stored: as they lie.")
    local_phase: float = setting(0.0, "Phase of tissue, vessels, fields; 1 as in life.", least=0)
    reference: str = setting("clean", "Of the images: clean, or measured, with their noise.")
    names: tuple[str, ...] | None = None
    wrap: float | None = setting(None, "Share of the columns in view; the rest folds over.")

    def __post_init__(self) -> None:
        """Check the reference."""
        if self.reference not in REFERENCES:
            raise InputError(
                f"reference must be one of {', '.join(REFERENCES)}, got {self.reference!r}."
            )
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and not abs(value) <= most:
                raise InputError(f"{name} must be finite and at most {most}, got {value}.")


def simulate_folder(
    folder: Path, settings: SimulationSettings, done: Callable[[int, int], None] | None = None
) -> dict[str, list[Path]]:
    """Writes `folder/<role>/<anatomy>[_<repeat>].h5` in the layout of fastMRI, fully sampled.

    The slices of a volume share its coils. Training, validation and test slices come from blocks of
    each anatomy with gaps between them; see `anatomy.split`.

    Args:
        folder: made if need be; files of the same names are replaced.
        settings: what to simulate.
        done: told of the volumes written and to be written.

    Returns:
        The files by role.

    Raises:
        InputError: if a setting is out of range, the folder cannot be written, or a file in it
            would be lost that is no simulated scan.
    """
    if settings.repeats < 1:
        raise InputError(f"repeats must be at least 1, got {settings.repeats}.")
    generator = torch.Generator().manual_seed(settings.seed)
    anatomies = load_anatomies(settings.anatomies, settings.plane, settings.names)
    plan = _plan(anatomies, settings)
    files: dict[str, list[Path]] = {role: [] for role in ROLES}
    for role in ROLES:
        make_folder(folder / role)
    read = [] if settings.anatomies is None else [settings.anatomies]
    written = [Output(folder / one.role / f"{one.name}.h5", SIMULATED) for one in plan]
    check_outputs(written, read)
    for i, one in enumerate(plan, start=1):
        path = folder / one.role / f"{one.name}.h5"
        write_volume(path, _volume(one, settings, generator))
        files[one.role].append(path)
        if done is not None:
            done(i, len(plan))
    return files


@dataclass(frozen=True, eq=False)
class _Planned:
    """A volume to simulate: what it is for, its name, its images, and the columns it sees."""

    role: str
    name: str
    images: Tensor
    columns: int


def _plan(anatomies: dict[str, Tensor], settings: SimulationSettings) -> list[_Planned]:
    plan: list[_Planned] = []
    stated = wraps(settings.anatomies) if settings.wrap is None else {}
    for name, images in anatomies.items():
        wrap = stated.get(name, 1.0) if settings.wrap is None else settings.wrap
        columns = columns_in_view(settings.size, wrap)
        roles = split(images.shape[0])
        for role in ROLES:
            chosen = resize(images[list(getattr(roles, role))], settings.size).clamp(0, 1)
            repeats = settings.repeats if role == "train" else 1
            plan += [
                _Planned(role, name if repeats == 1 else f"{name}_{repeat}", chosen, columns)
                for repeat in range(repeats)
            ]
    return plan


def _volume(planned: _Planned, settings: SimulationSettings, generator: torch.Generator) -> Volume:
    images = planned.images
    shape = (images.shape[-2], images.shape[-1])
    coils = biot_savart_coils(shape, settings.n_coils, generator)
    simulated = [
        simulate(
            image,
            settings.n_coils,
            generator,
            settings.noise_std,
            coils,
            local_phase=settings.local_phase,
        )
        for image in images
    ]
    seen = [in_view(one, planned.columns) for one in simulated]
    kspace = torch.stack([one for one, _ in seen])
    clean = torch.stack([reference for _, reference in seen])
    return Volume(
        kspace,
        rss(ifft2c(kspace)) if settings.reference == "measured" else clean,
        acquisition=planned.name,
        patient_id=_PATIENT,
    )
