"""An example of a package that adds a predictor, a policy and a trace format to moe_beyond."""
