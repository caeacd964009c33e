"""Predict, replay and run mixture-of-experts routing under a memory budget."""

__version__ = "0.1.0"
