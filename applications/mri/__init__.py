"""Multi-coil MRI reconstruction without coil sensitivities, trained by Lagrangian multipliers."""
