"""The cache core: one state machine that the replay and a runtime both step. numpy and numba only."""
