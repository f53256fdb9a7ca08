"""Entry point of `python -m applications.mri`."""

from applications.mri.commands.app import main

main()
