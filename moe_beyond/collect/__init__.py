"""Run a transformers MoE and record where it routes."""
