"""Student, optimizer and teacher over the ranks."""
