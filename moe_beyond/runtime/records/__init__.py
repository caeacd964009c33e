"""Records of a run: recorded on disk, replayed as it ran, and summed up next to LRU and Belady."""
