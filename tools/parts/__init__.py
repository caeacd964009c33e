"""Modules that several or large tools consist of."""
