"""What an MRI scan is as mathematics: transforms, masks, coils."""
