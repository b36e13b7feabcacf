"""What is done to a committed data set: audit, takedown, merge, diff, statistics."""
