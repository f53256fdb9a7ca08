"""A network as one module: the same images, and a program that torch exports."""

from dataclasses import replace

import pytest
import torch

from applications.mri.network.architecture import light, narrow, paper
from applications.mri.network.exported import ReconstructionModule
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained
from bilevel import tree

ARCHITECTURES = {
    "light": replace(light(), n_phases=2, gains=4, warm_up=3),
    "narrow": replace(narrow(3), n_phases=2, filters=4, features=2),
    "paper": replace(paper(3), n_phases=2, filters=4, features=2),
}


@pytest.mark.parametrize("name", ["light", "paper", pytest.param("narrow", marks=pytest.mark.slow)])
def test_the_module_gives_the_images_of_the_network_and_is_exported(name):
    generator = torch.Generator().manual_seed(0)
    network = Network(ARCHITECTURES[name], 2)
    control = tree.map_leaves(
        lambda x: (
            None if x is None else x + 0.05 * torch.randn(x.shape, generator=generator).to(x.dtype)
        ),
        network.controls(),
    )
    trained = Trained(network, control, {})
    kspace = torch.randn(2, 3, 36, 28, dtype=torch.complex64, generator=generator)
    mask = torch.zeros(36, 28, dtype=torch.bool)
    mask[:, ::2] = mask[:, 10:18] = True
    scan = network.prepare(kspace, mask)
    module = ReconstructionModule(trained)
    inputs = module.inputs(scan)
    with torch.no_grad():
        program = torch.export.export(module, inputs).module()  # nothing of it is left behind
        found = module(*inputs)
        torch.testing.assert_close(found, network.reconstruct(scan, control).image)
        torch.testing.assert_close(program(*inputs), found)
    # Its weights are copies.
    for parameter in module.parameters():
        parameter.data.zero_()
    again = network.reconstruct(scan, control).image
    torch.testing.assert_close(again, found)
