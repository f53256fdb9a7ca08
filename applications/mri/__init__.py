"""Multi-coil MRI reconstruction without coil sensitivities, trained by Lagrangian multipliers."""

from typing import Any

__all__ = ["reconstruct"]


def __getattr__(name: str) -> Any:
    """`reconstruct`, imported when it is asked for: a program first says which extra it lacks."""
    if name in __all__:
        from applications.mri.network.checked import reconstruct

        return reconstruct
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
