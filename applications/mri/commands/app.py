"""The command line `bilevel-mri COMMAND`."""

from applications.command_line import command_line
from applications.mri.commands.demo import demo_command
from applications.mri.commands.meta import meta_train, transfer
from applications.mri.commands.scans import (
    evaluate_command,
    reconstruct_command,
    simulate_command,
)
from applications.mri.commands.train import train_command

app = command_line(
    "Multi-coil MRI reconstruction without coil sensitivities, trained by multipliers.",
    "mri",
    {
        "demo": demo_command,
        "simulate": simulate_command,
        "train": train_command,
        "evaluate": evaluate_command,
        "reconstruct": reconstruct_command,
        "meta-train": meta_train,
        "transfer": transfer,
    },
)
