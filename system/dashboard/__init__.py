"""The web dashboard: runs as their event logs tell them, live and afterwards. Start at `serve`."""
