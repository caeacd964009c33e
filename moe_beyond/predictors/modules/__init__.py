"""Neural-network modules that architectures share."""
