"""The command line `bilevel-mri COMMAND`."""

from applications.command_line import command_line
from applications.mri.commands.demo import demo_command
from applications.mri.commands.meta import meta_train, transfer
from applications.mri.commands.scans import (
    evaluate_command,
    reconstruct_command,
    simulate_command,
)
from applications.mri.commands.shared import may_follow_links
from applications.mri.commands.train import train_command

app = command_line(
    "Multi-coil MRI reconstruction without coil sensitivities, trained by multipliers.",
    "mri",
    {
        "demo": demo_command,
        "simulate": may_follow_links(simulate_command),
        "train": may_follow_links(train_command),
        "evaluate": may_follow_links(evaluate_command),
        "reconstruct": may_follow_links(reconstruct_command),
        "meta-train": may_follow_links(meta_train),
        "transfer": may_follow_links(transfer),
    },
)
