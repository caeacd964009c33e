"""Trace sets out of other tools' recordings, one file a format."""
