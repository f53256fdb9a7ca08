"""Entry point of `bilevel-mri` and of `python -m applications.mri`."""

from applications.errors import needing

with needing("mri"):
    from applications.mri.commands.app import app


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
