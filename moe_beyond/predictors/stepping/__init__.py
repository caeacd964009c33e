"""Decoding state and numba kernels of steppers."""
