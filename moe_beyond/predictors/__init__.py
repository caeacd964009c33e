"""Predictors: what a model will route to next, from what is known before it does.

Each architecture is one file; `moe_beyond.predictors.registry` lists them by name.
"""
