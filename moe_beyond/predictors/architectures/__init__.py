"""The predictor architectures, one per file."""
