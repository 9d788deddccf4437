"""Benchmarks: one file per operation and per path, each against reference implementations in the same run."""
