"""The network, its checkpoints, and the Colorizer."""
