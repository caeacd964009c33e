"""Recorded routing on disk: the trace set."""
