"""What happened in a run, from its event log."""
