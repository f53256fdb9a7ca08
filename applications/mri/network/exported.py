"""A trained network as one `nn.Module`, without checks that depend on data: for `torch.export`."""

import copy
from typing import Any

from torch import Tensor, nn

from applications.mri.network.scan import Scan
from applications.mri.network.weights import Trained


class ReconstructionModule(nn.Module):
    """The phases of a network as a function of tensors; preparing a scan stays outside.

    Args:
        trained: network and weights, of which it has copies.

    Example:
        >>> import torch
        >>> from applications.mri.network.weights import pretrained
        >>> trained, mask = pretrained(), torch.ones(32, 32, dtype=torch.bool)
        >>> kspace = torch.randn(1, 3, 32, 32, dtype=torch.complex64)
        >>> module = ReconstructionModule(trained)
        >>> inputs = module.inputs(trained.network.prepare(kspace, mask))
        >>> module(*inputs).shape  # and torch.export.export(module, inputs) is a program
        torch.Size([1, 32, 32])
    """

    def __init__(self, trained: Trained) -> None:
        """Copy the phases and load the weights."""
        super().__init__()
        self.network = trained.network
        phases = copy.deepcopy(trained.network.phases)
        phases.load(trained.control)
        self.initial = phases.initial
        self.phases = nn.ModuleList(phases.modules)
        self.combine = getattr(phases.modules[-1], "combine", nn.Identity())

    def inputs(self, scan: Scan) -> tuple[Any, ...]:
        """What `forward` takes of a scan.

        Args:
            scan: from `Network.prepare`.

        Returns:
            Its scale, what g0 receives, and what every phase receives; tensors, or tuples of them.
        """
        return scan.scale, self.network.observation(scan), *self.network.dynamics(scan).context

    def forward(self, scale: Tensor, observation: Any, *context: Any) -> Tensor:
        """Images in the units of the scan, ``(batch, rows, columns)``."""
        state = observation if self.initial is None else self.initial(observation)
        for phase in self.phases:
            state = phase(state, *context)
        phases = None if self.network.architecture.gains else context[-1]
        return scale[:, 0] * self.network.combined(state, phases, self.combine)
