"""Experts in host memory and in files, and loading a model without them."""
