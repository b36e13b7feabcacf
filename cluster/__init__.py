"""Machines and what they share: storage, events, processes. Imports nothing of ours, and no torch."""
