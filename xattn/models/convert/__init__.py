"""Checkpoints in formats of other tools: readers and converters."""
