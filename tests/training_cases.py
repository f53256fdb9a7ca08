"""Small scans and networks to train."""

from dataclasses import replace

import torch

from applications.mri.data import SliceDataset, Volume, write_volume
from applications.mri.network.architecture import paper
from applications.mri.network.reconstruction import Network
from applications.mri.physics.operators import ifft2c, rss
from applications.mri.sampling import CartesianRandom
from applications.mri.simulation.simulate import simulate
from applications.mri.training.settings import TrainingSettings
from applications.mri.training.training import train
from bilevel import tree

COILS, SIZE = 2, 24
SAMPLING = CartesianRandom(2, 0.25)
BASE = TrainingSettings(samplings=(SAMPLING,), steps=4, warmup=2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def simulated(n_slices, seed=0):
    axis = (torch.arange(SIZE) - SIZE // 2) / (SIZE / 2)
    disc = ((axis[:, None] ** 2 + axis[None, :] ** 2) < 0.6).float() * 0.8
    disc[8:12, 6:14] = 0.3
    generator = seeded(seed)
    return [simulate(disc, COILS, generator, noise_std=1e-3) for _ in range(n_slices)]


def write_scans(folder):
    """Two files of two fully sampled slices."""
    for name, seed in (("a", 0), ("b", 1)):
        kspace = torch.stack([one.kspace for one in simulated(2, seed)])
        write_volume(folder / f"{name}.h5", Volume(kspace, rss(ifft2c(kspace))))
    return SliceDataset(folder)


def network(preset=paper, kind=Network):
    sizes = {"n_phases": 2, "filters": 3, "features": 2, "feature_kernel": 3}
    return kind(replace(preset(COILS), **sizes), seed=1)


def trained(scans, settings, net=None, **arguments):
    net = net or network()
    return train(net, net.controls(), scans, settings, **arguments)


def same(one, other):
    pairs = zip(tree.leaves_of(one.control), tree.leaves_of(other.control), strict=True)
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)
