"""Files that come with the package: magnitude images, one measured scan, trained weights."""
