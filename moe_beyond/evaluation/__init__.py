"""Traces and a predictor in, metrics and replay results out."""
