"""The command line `bilevel-mri`."""
