import pytest
import torch
import torch.nn.functional as F

from applications.mri.network.layers import (
    ComplexConv2d,
    complex_net,
    soft_threshold,
    to_complex,
    to_planes,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_complex(*shape, dtype=torch.complex128, seed=0):
    return torch.randn(shape, dtype=dtype, generator=seeded(seed))


def test_planes_are_real_parts_before_imaginary_parts_and_back():
    image = random_complex(2, 3, 4, 5)
    planes = to_planes(image)
    assert torch.equal(planes[:, :3], image.real)
    assert torch.equal(planes[:, 3:], image.imag)
    assert torch.equal(to_complex(planes), image)


def doubled(module):
    """In double precision; `module.to` warns of complex weights."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            setattr(part, name, torch.nn.Parameter(value.detach().to(torch.complex128)))
    return module


@pytest.mark.parametrize("kernel", [1, 3, 9])
def test_a_complex_convolution_is_that_of_torch_with_zeros_around(kernel):
    layer = doubled(ComplexConv2d(3, 2, kernel, seeded()))
    image = random_complex(2, 3, 10, 11)
    expected = F.conv2d(image, layer.weight, padding=kernel // 2)
    torch.testing.assert_close(to_complex(layer(to_planes(image))), expected)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]  # no bias


def test_a_complex_convolution_has_the_gradient_of_that_of_torch():
    layer = doubled(ComplexConv2d(2, 2, 3, seeded()))
    image = random_complex(1, 2, 5, 5)
    weight = layer.weight.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        F.conv2d(image, weight, padding=1).abs().square().sum(), weight
    )
    value = to_complex(layer(to_planes(image))).abs().square().sum()
    torch.testing.assert_close(torch.autograd.grad(value, layer.weight)[0], expected)


def test_weights_have_the_variance_of_xavier():
    n_in, n_out, kernel = 40, 60, 5
    weight = ComplexConv2d(n_in, n_out, kernel, seeded()).weight.detach()
    variance = 1 / (kernel**2 * (n_in + n_out))  # of each part
    for part in (weight.real, weight.imag):
        # 60 000 values: the standard deviation of a sample variance is 0.6 %.
        assert float(part.var()) == pytest.approx(variance, rel=0.03)
        assert abs(float(part.mean())) < 4 * (variance / part.numel()) ** 0.5
    correlation = (weight.real * weight.imag).mean() / variance
    assert abs(float(correlation)) < 4 / weight.numel() ** 0.5


def test_weights_depend_on_the_generator_alone():
    first, again, other = (ComplexConv2d(2, 3, 3, seeded(s)).weight for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_layer_that_starts_from_zero_takes_the_same_draws():
    one, other = seeded(), seeded()
    assert not ComplexConv2d(2, 3, 3, one, zero=True).weight.any()
    ComplexConv2d(2, 3, 3, other)
    assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=other))


def test_a_net_is_convolutions_with_relu_on_both_parts_between_them():
    net = doubled(complex_net((2, 3, 4, 1), 3, seeded()))
    weights = list(net.parameters())
    assert [tuple(w.shape) for w in weights] == [(3, 2, 3, 3), (4, 3, 3, 3), (1, 4, 3, 3)]
    value = image = random_complex(2, 2, 6, 7)
    for i, weight in enumerate(weights):
        value = F.conv2d(value, weight, padding=1)
        if i < len(weights) - 1:
            value = torch.complex(F.relu(value.real), F.relu(value.imag))
    torch.testing.assert_close(to_complex(net(to_planes(image))), value)
    zero = complex_net((2, 3, 4, 1), 3, seeded(), zero=True)
    assert [bool(w.any()) for w in zero.parameters()] == [True, True, False]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, 5.0, -0.2])
def test_the_soft_threshold_shrinks_magnitudes_and_keeps_phases(threshold):
    image = random_complex(2, 3, 4, 5)
    found = to_complex(soft_threshold(to_planes(image), torch.tensor(threshold).double()))
    magnitude = (image.abs() - threshold).clamp(min=0)
    torch.testing.assert_close(found, torch.polar(magnitude, image.angle()))


@pytest.mark.parametrize("threshold", [0.0, 0.3, -0.2])
def test_the_soft_threshold_is_zero_at_zero_with_a_finite_gradient(threshold):
    planes = torch.tensor([0.0, 2.0, 0.0, 0.0], dtype=torch.float64).reshape(1, 4, 1, 1)
    planes.requires_grad_()
    value = torch.tensor(threshold, dtype=torch.float64, requires_grad=True)
    found = soft_threshold(planes, value)
    assert found[0, [0, 2]].tolist() == [[[0.0]], [[0.0]]]
    gradient, slope = torch.autograd.grad(found.sum(), (planes, value))
    assert gradient[0, [0, 2]].flatten().tolist() == [0.0, 0.0]
    assert float(gradient[0, 1]) == 1.0  # along a magnitude the slope is 1
    assert float(slope) == -1.0


def test_the_gradient_of_the_soft_threshold_is_that_of_differences():
    planes = torch.randn(1, 4, 3, 3, dtype=torch.float64, generator=seeded())
    planes, threshold = planes.requires_grad_(), torch.tensor(0.4).double().requires_grad_()
    assert torch.autograd.gradcheck(soft_threshold, (planes, threshold))
