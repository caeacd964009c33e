"""Statistics of trace sets: what `inspect` shows."""
