"""The page of ``moe-beyond report``: one self-contained HTML file about a predictor or a run."""
