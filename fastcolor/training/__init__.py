"""Training: data, loop, configuration."""
