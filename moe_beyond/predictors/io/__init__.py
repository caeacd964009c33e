"""Predictor folders, checkpoints and cards."""
