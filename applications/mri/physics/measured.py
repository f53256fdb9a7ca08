r"""What was measured of a slice, and steps of its coil images towards it.

A step is :math:`u - \rho F^H P (F u - f)`. It is taken between two of torch's Fourier transforms as
they are: where the zero frequency lies, and where the middle of the image, changes the two by
phases that cancel, but for the order of the samples. Where whole columns were sampled the
transforms along columns cancel too, and are left out.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from applications.mri.physics.masks import samples_columns
from applications.mri.physics.operators import ifft2c

_COLUMNS = (-1,)
_ALL = (-2, -1)


@dataclass(frozen=True, eq=False)
class Measured:
    """Samples and their places, in the order of torch's Fourier transform.

    Attributes:
        samples: zeros where nothing was measured, complex, ``(..., coils, rows, columns)``.
        mask: boolean, ``(..., rows, columns)``; of one row where whole columns were measured, and
            the transform of ``samples`` is that along rows alone.
    """

    samples: Tensor
    mask: Tensor

    @classmethod
    def of(cls, kspace: Tensor, mask: Tensor) -> Self:
        """Brings k-space into that order.

        Args:
            kspace: complex, ``(..., coils, rows, columns)``; values outside the mask are ignored.
            mask: boolean, ``(rows, columns)``, or as many axes as ``kspace``, broadcastable to it.

        Returns:
            What was measured.
        """
        here = torch.fft.ifftshift(mask, dim=_ALL)
        axes = _ALL
        if samples_columns(mask):
            here, axes = here[..., :1, :], _COLUMNS
        samples = torch.fft.fftn(ifft2c(kspace * mask), dim=axes, norm="ortho") * here
        return cls(samples, here)

    def towards(self, coil_images: Tensor, length: Tensor | float = 1.0) -> Tensor:
        """A step towards what was measured.

        Args:
            coil_images: u, ``(..., coils, rows, columns)``.
            length: rho; a tensor of one real number where its derivative is wanted.

        Returns:
            The coil images after it.
        """
        axes = _COLUMNS if self.mask.shape[-2] == 1 else _ALL
        found = torch.fft.fftn(coil_images, dim=axes, norm="ortho")
        kept = 1 - length * self.mask.to(found.real.dtype)
        if isinstance(length, Tensor) and torch.is_grad_enabled():
            found = found * kept + length * self.samples
        elif isinstance(length, Tensor):  # in place, which saves the time of making room
            found.mul_(kept).addcmul_(self.samples, length.to(self.samples))
        else:
            found.mul_(kept).add_(self.samples, alpha=length)
        return torch.fft.ifftn(found, dim=axes, norm="ortho")
