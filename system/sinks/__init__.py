"""Where the events of a run go besides its log, while it runs: each sink works in a thread of its own."""
