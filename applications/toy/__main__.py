"""Entry point of `bilevel-toy` and of `python -m applications.toy`."""

from applications.errors import needing

with needing("toy"):
    from applications.toy.cli import app


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
