"""Configuration of the monitoring around a run, made from the registry of metrics."""
