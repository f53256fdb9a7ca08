"""Multi-coil MRI reconstruction without coil sensitivities, trained by Lagrangian multipliers."""

from typing import Any

__all__ = ["reconstruct"]  # noqa: F822  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """`reconstruct`, imported when it is asked for: a program first says which extra it lacks."""
    from applications.mri.network import checked

    return getattr(checked, name)
