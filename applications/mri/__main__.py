"""Entry point of `python -m applications.mri`."""

from applications.mri.cli import main

main()
