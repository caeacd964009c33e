"""Recordings next to their replay: hits, bytes and times, and devices that are fitted to them."""
