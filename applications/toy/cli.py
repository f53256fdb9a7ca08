"""The command line: `python -m applications.toy task-weights`."""

import typer
from rich.console import Console

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Classification with cross-entropy: weights learned by bilevel descent.",
)
console = Console()


def main() -> None:
    """Run the command line."""
    app()


@app.callback()
def _commands() -> None:
    """Classification with cross-entropy: weights learned by bilevel descent."""
