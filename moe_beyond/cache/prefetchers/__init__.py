"""Prefetchers: which experts to ask for, out of what is known now; one file each."""
