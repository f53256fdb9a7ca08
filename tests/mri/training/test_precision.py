"""Autocast, checked on the CPU where torch emulates it; and on a GPU where there is one."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import BASE, SAMPLING, SIZE, network, seeded, simulated, trained, write_scans

import bilevel as bl
from applications.errors import InputError
from applications.mri.network.architecture import narrow, paper
from applications.mri.network.reconstruction import Loss
from applications.mri.physics.operators import ifft2c
from applications.mri.training.precision import Autocast, Precision, check_device, in_precision
from bilevel import tree


class Kinds(TorchDispatchMode):
    """Notes the dtypes that convolutions and Fourier transforms compute in."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("convolution", "convolution_backward", "_fft_c2c"):
            self.seen.setdefault(name, set()).add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def posed(preset):
    net = network(preset)
    (one,) = simulated(1)
    scan = net.prepare(one.kspace[None], SAMPLING.mask((SIZE, SIZE), seeded(1)))
    images = ifft2c(one.kspace)[None]
    generator = seeded(2)  # some weights start from zero, and would hide what they multiply

    def moved(weight):
        if weight is None:
            return None
        return weight + 0.05 * torch.randn(weight.shape, dtype=weight.dtype, generator=generator)

    control = tree.map_leaves(moved, net.controls())
    return net.training_problem(scan, images, one.reference[None], Loss()), control


@pytest.mark.parametrize("preset", [paper, narrow])
def test_only_convolutions_are_rounded_and_gradients_agree_to_bfloat16(preset):
    (problem, start), control = posed(preset)
    exact = bl.adjoint(problem, start, control)
    rounded = replace(problem, dynamics=Autocast(problem.dynamics, "cpu"))
    with Kinds() as kinds:
        found = bl.adjoint(rounded, start, control)
    assert torch.bfloat16 in kinds.seen["convolution"]
    assert torch.bfloat16 in kinds.seen["convolution_backward"]
    assert kinds.seen["_fft_c2c"] == {torch.complex64}
    assert found.final_state.dtype == torch.complex64
    assert found.cost.dtype == torch.float32
    pairs = zip(tree.leaves_of(found.gradient), tree.leaves_of(exact.gradient), strict=True)
    assert all(a is b is None or a.dtype == b.dtype for a, b in pairs)
    eps = torch.finfo(torch.bfloat16).eps  # some layers one after the other
    assert float(found.cost) == pytest.approx(float(exact.cost), rel=4 * eps)
    assert float(found.cost) != float(exact.cost)
    error = tree.norm(tree.subtract(found.gradient, exact.gradient))
    assert error < 8 * eps * tree.norm(exact.gradient)


def test_float32_leaves_the_problem_as_it_is():
    (problem, _), _ = posed(paper)
    assert in_precision(problem, Precision.FLOAT32, "cpu") is problem
    assert in_precision(problem, Precision.BFLOAT16, "cuda:1").dynamics == Autocast(
        problem.dynamics, "cuda"
    )


def test_a_precision_without_a_gpu_and_a_device_that_is_not_there_are_refused(monkeypatch):
    with pytest.raises(InputError, match=r"precision 'bfloat16' needs a GPU, device is 'cpu', wh"):
        replace(BASE, precision=Precision.BFLOAT16)
    with pytest.raises(InputError, match=r"device must be 'cpu' or 'cuda', got 'tpu'; choose"):
        replace(BASE, device="tpu")
    with pytest.raises(InputError, match=r"device must be 'cuda' or 'cuda:0' .*, got 'cuda:x'"):
        replace(BASE, device="cuda:x")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(InputError, match=r"'cuda:1' needs a GPU, torch sees 1 of them; choose"):
        replace(BASE, device="cuda:1")
    check_device("cuda:0", Precision.BFLOAT16)
    check_device("cuda", Precision.FLOAT32)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(InputError, match=r"'cuda' needs a GPU, torch sees 0 of them; choose"):
        replace(BASE, device="cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("precision", Precision)
def test_a_training_on_a_gpu_is_that_of_the_cpu(tmp_path, precision):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    scans = write_scans(tmp_path)
    settings = replace(BASE, steps=8, learning_rate=1e-3)
    truth = trained(scans, settings)
    found = trained(scans, replace(settings, device="cuda", precision=precision), validation=scans)
    tolerance = 1e-3 if precision is Precision.FLOAT32 else 3e-2
    assert found.costs == pytest.approx(truth.costs, rel=tolerance)
    assert {x.device.type for x in tree.leaves_of(found.control) if x is not None} == {"cpu"}
