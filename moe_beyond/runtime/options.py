"""Values that a command reads before it imports torch."""

TIERS = ("disk", "host")
"""Places of experts without a slot: the checkpoint's files, or host memory."""
READERS = 4
"""Number of threads that read experts, by default."""
FUTURE_POLICIES = ("belady", "belady_bypass")
"""Policies that need the future, which a run does not know; their modules are not imported for a help text."""
RUN_FILE = "run.json"
"""File of settings and figures in the recording of a run."""
