"""Converters from checkpoint formats of other tools."""
