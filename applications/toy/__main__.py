"""Entry point of `python -m applications.toy`."""

from applications.toy.cli import main

main()
