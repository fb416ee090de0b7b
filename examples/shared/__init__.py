"""What the larger examples share."""
