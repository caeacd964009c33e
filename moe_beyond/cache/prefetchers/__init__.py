"""Prefetchers: which experts of a layer to ask for, given its scores; one file each."""
