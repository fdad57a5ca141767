"""Implementations of the head statistics: same inputs, same outputs, nothing else."""
