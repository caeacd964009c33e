"""Slots: their memory, the threads that move experts into them, and kernels that compute in them."""
