"""Stepping the cache core and a predictor with a running model, and the log of what happened."""
