"""Multi-coil MRI reconstruction without coil sensitivities, trained by Lagrangian multipliers."""

from applications.mri.network.checked import reconstruct

__all__ = ["reconstruct"]
