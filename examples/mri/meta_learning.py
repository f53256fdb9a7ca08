r"""
Meta-learning for MRI: training data that do harm
=================================================

A reconstruction network is trained on three tasks at once. One has good references; those of the
two others are full of noise, to stand for data gathered from many places. With equal weights the
network learns the noise. With learned weights (Algorithm 3) it finds out, on validation slices of
the good task, what to leave aside. Training and hypergradient both go by multipliers.
"""

# %%
# Three tasks
# -----------
# Scans are simulated from bundled anatomies: 48 x 48 pixels and four coils, so that it takes half a
# minute. Training, validation and test are different slices.
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bilevel as bl
from applications.mri.evaluation.baselines import zero_filled
from applications.mri.evaluation.metrics import score
from applications.mri.meta.learning import learn
from applications.mri.meta.settings import Ablation, MetaSettings
from applications.mri.network.architecture import tiny
from applications.mri.network.reconstruction import Network
from applications.mri.tasks.task_list import TaskSettings
from applications.mri.tasks.tasks import open_tasks

EVALUATIONS = 90
scans = {"size": 48, "coils": 4, "acceleration": 4.0, "center": 0.1}
settings = [
    TaskSettings("T1", anatomy="brain_t1_axial", **scans),
    TaskSettings(
        "bad 1", anatomy="brain_pd", roles=("train",), target_noise=0.5, **scans
    ),
    TaskSettings(
        "bad 2",
        anatomy="brain_t1_sagittal",
        roles=("train",),
        target_noise=0.5,
        **scans,
    ),
]
folder = tempfile.TemporaryDirectory()
tasks = open_tasks(settings, Path(folder.name))

# %%
# Two trainings
# -------------
# Both have the same budget, a number of losses of slices. Learning weights spends some of it on
# hypergradients.
network = Network(tiny(n_coils=4), seed=0)
training = MetaSettings(
    evaluations=EVALUATIONS,
    inner_steps=4,
    learn_share=0.4,
    warmup=5,
    checkpointing=bl.Checkpointing(block=None),
)
trained = {
    "equal weights": learn(
        Ablation.UNIFORM, network, network.controls(), tasks, training
    ),
    "learned weights": learn(
        Ablation.VECTOR, network, network.controls(), tasks, training
    ),
}
for name, found in trained.items():
    print(
        f"{name:16} {found.inner_steps} steps, "
        f"weights {found.sigma.numpy().round(2)}"
    )

# %%
# A test slice
# ------------
# It was seen by neither level.
(task,) = tasks.of("test")
one = task.parts["test"][0]
mask = task.sampling.mask(
    one.kspace.shape[-2:], torch.Generator().manual_seed(0)
)
kspace = torch.where(mask, one.kspace, 0)


def reconstructed(control: bl.PerStep) -> Tensor:
    scan = network.prepare(kspace[None], mask)
    return network.reconstruct(scan, control).image[0]


images = {"zero-filled": zero_filled(kspace)}
images |= {
    name: reconstructed(found.models["all"]) for name, found in trained.items()
}
psnr = {
    name: score(one.reference[None], image[None]).psnr
    for name, image in images.items()
}
for name, decibels in psnr.items():
    print(f"{name:16} {decibels:.1f} dB")
folder.cleanup()

# %%
# The figure
# ----------
# Thirty steps are few, so neither network is a good one. But of the two, one learned to
# reconstruct, and the other to draw noise.
figure = plt.figure(figsize=(6, 7.5))
panels = figure.subplot_mosaic(
    [
        ["all data", "zero-filled"],
        ["equal weights", "learned weights"],
        ["bars", "bars"],
    ],
    height_ratios=[5, 5, 3],
)
brightest = float(one.reference.max())
panels["all data"].set_title("all data")
panels["all data"].imshow(
    one.reference.numpy(), cmap="gray", vmin=0, vmax=brightest
)
for name, image in images.items():
    panels[name].set_title(f"{name}: {psnr[name]:.1f} dB")
    panels[name].imshow(image.numpy(), cmap="gray", vmin=0, vmax=brightest)
for name in ("all data", *images):
    panels[name].axis("off")
for k, (name, found) in enumerate(trained.items()):
    places = [i + 0.4 * k for i in range(len(found.sigma))]
    panels["bars"].bar(
        places, found.sigma.tolist(), 0.35, color=f"C{1 - k}", label=name
    )
panels["bars"].set_xticks(
    [0.2, 1.2, 2.2], [task.name for task in tasks.of("train")]
)
panels["bars"].set(xlabel="training task", ylabel="weight")
panels["bars"].legend()
# sphinx_gallery_alt = "A test slice by both networks, and the weights of the three tasks"
plt.show()

# %%
assert psnr["learned weights"] > psnr["zero-filled"] > psnr["equal weights"]
assert trained["learned weights"].sigma[0] > 0.5
