"""One page about a predictor or a run: what it was fitted on, what it predicts, what that is worth."""
