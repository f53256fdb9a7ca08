"""Steps towards what was measured, against the operators that define them."""

import pytest
import torch

from applications.mri.physics.measured import Measured
from applications.mri.physics.operators import fft2c, ifft2c, sample, sample_adjoint

SHAPES = [(8, 10), (8, 6), (7, 8), (9, 5), (1, 4)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_complex(*shape, seed=0):
    return torch.randn(shape, dtype=torch.complex128, generator=seeded(seed))


def masks(shape):
    places = torch.rand(shape, generator=seeded(3)) < 0.5
    columns = (torch.rand(shape[1], generator=seeded(4)) < 0.5).expand(shape)
    return {"places": places, "columns": columns, "all": torch.ones(shape, dtype=torch.bool)}


@pytest.mark.parametrize("kind", ["places", "columns", "all"])
@pytest.mark.parametrize("length", [1.0, 0.3, torch.tensor(0.3, dtype=torch.float64)], ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_is_the_gradient_of_the_distance(shape, length, kind):
    mask = masks(shape)[kind]
    kspace, images = random_complex(2, *shape), random_complex(2, *shape, seed=1)
    expected = images - length * sample_adjoint(sample(images, mask) - kspace, mask)
    data = Measured.of(kspace, mask)
    torch.testing.assert_close(data.towards(images, length), expected, rtol=0, atol=1e-12)
    assert (data.mask.shape[-2] == 1) == (kind != "places" or shape[0] == 1)


@pytest.mark.parametrize("kind", ["places", "columns"])
def test_after_a_whole_step_nothing_is_left_to_do(kind):
    mask = masks((8, 9))[kind]
    kspace = random_complex(2, 8, 9)
    found = Measured.of(kspace, mask).towards(random_complex(2, 8, 9, seed=1))
    torch.testing.assert_close(fft2c(found)[:, mask], kspace[:, mask], rtol=0, atol=1e-12)


def test_one_mask_a_sample_is_taken():
    mask = torch.stack([*masks((8, 9)).values()])[:, None]
    kspace, images = random_complex(3, 2, 8, 9), random_complex(3, 2, 8, 9, seed=1)
    expected = images - sample_adjoint(sample(images, mask) - kspace, mask)
    found = Measured.of(kspace, mask).towards(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_steps_are_differentiated_in_images_and_length():
    mask = masks((4, 5))["places"]
    data = Measured.of(random_complex(2, 4, 5), mask)
    images = random_complex(2, 4, 5, seed=1).requires_grad_()
    length = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(data.towards, (images, length))
    assert torch.autograd.gradcheck(data.towards, (images,))


def test_what_is_given_is_left_alone():
    mask = masks((8, 9))["places"]
    kspace, images = random_complex(2, 8, 9), random_complex(2, 8, 9, seed=1)
    before = kspace.clone(), images.clone()
    Measured.of(kspace, mask).towards(images)
    assert torch.equal(kspace, before[0])
    assert torch.equal(images, before[1])
    torch.testing.assert_close(ifft2c(fft2c(images)), images)
