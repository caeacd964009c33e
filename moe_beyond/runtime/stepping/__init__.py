"""Stepping the cache core and a predictor with a running model; sequences, times and bytes of a run."""
