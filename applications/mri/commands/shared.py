"""Options that several commands have, and how scores are printed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from applications.command_line import console
from applications.inputs import following_links
from applications.mri.evaluation.scoring import Evaluation, table_rows
from applications.mri.network.architecture import ANY, PRESETS, preset_named
from applications.mri.network.certificate import SliceCertificate
from applications.mri.network.weights import PRETRAINED, Trained, beginning
from applications.mri.tasks.task_list import TaskSettings, listed_tasks
from applications.settings import setting

_FOLLOW = Annotated[
    bool,
    typer.Option(
        "--follow-links",
        help="Let HDF5 files read others: external links and storage, virtual datasets.",
        rich_help_panel="Files",
    ),
]


def may_follow_links(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the option `--follow-links`, which holds while it runs.

    Args:
        command: reads files.

    Returns:
        The command.
    """

    @wraps(command)
    def run(follow_links: bool = False, **arguments: Any) -> None:
        with following_links(follow_links):
            command(**arguments)

    own = signature(command)
    one = Parameter("follow_links", Parameter.KEYWORD_ONLY, default=False, annotation=_FOLLOW)
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), one])  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {**command.__annotations__, "follow_links": _FOLLOW}
    return run


@dataclass(frozen=True)
class TaskLists:
    """Tasks as the command line names them.

    Attributes:
        tasks: YAML file.
        task: further ones, one a text.
    """

    tasks: Path | None = setting(None, "Task list, YAML.")
    task: list[str] | None = setting(None, "One more task: name=...,anatomy=...,acceleration=...")

    @property
    def empty(self) -> bool:
        """Whether no task is named."""
        return self.tasks is None and not self.task

    @property
    def files(self) -> list[Path]:
        """What is read."""
        return [] if self.tasks is None else [self.tasks]

    def listed(self) -> list[TaskSettings]:
        """All of them; none is an InputError."""
        return listed_tasks(self.tasks, self.task or [])


@dataclass(frozen=True)
class Beginning:
    """The network that is trained, and the weights it begins with.

    Attributes:
        preset: of the network.
        coils: of the network.
        init: weights.
    """

    preset: str | None = setting(None, f"Network: {', '.join(PRESETS)}; light.")
    coils: int | None = setting(
        None, "Of the network, if its preset is for a number; as many as scans have, or 8.", least=1
    )
    init: str | None = setting(None, "Weights to begin with; pretrained: the bundled ones.")

    @property
    def named(self) -> bool:
        """Whether any of it is chosen."""
        return any(option is not None for option in (self.preset, self.coils, self.init))

    @property
    def files(self) -> list[Path]:
        """What is read."""
        return [] if self.init in (None, PRETRAINED) else [Path(self.init)]

    @property
    def coils_matter(self) -> bool:
        """Whether new weights of the preset are for a number of coils."""
        return preset_named(self.preset or "light").n_coils != ANY

    def weights(self) -> Callable[[int], Trained]:
        """The weights for a seed, see `beginning`."""
        return beginning(self.init, self.preset, self.coils)


def print_scores(evaluation: Evaluation, title: str) -> None:
    """A table of the means, on the screen.

    Args:
        evaluation: what is printed.
        title: of the table.
    """
    table = Table(title=title, caption=f"Metrics: {evaluation.convention}")
    for name in ("method", "PSNR [dB]", "gain [dB]", "object [dB]", "SSIM", "NMSE", "s / slice"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in table_rows(evaluation):
        table.add_row(*row)
    console.print(table)


def print_checks(certificates: Mapping[str, SliceCertificate]) -> None:
    """What the check says of slices, on the screen.

    Args:
        certificates: by the name of the slice.
    """
    table = Table(title="The check: samples held out, and predicted")
    table.add_column("slice")
    for name in ("error", "of l1-SPIRiT", "verdict"):
        table.add_column(name, justify="left" if name == "verdict" else "right")
    for name, one in certificates.items():
        verdict = "trusted" if one.trustworthy else one.reason
        table.add_row(name, f"{one.error:.3f}", f"{one.classical:.3f}", verdict)
    console.print(table)
