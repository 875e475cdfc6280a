"""Attributions: cross-attention, occlusion and the estimators that turn scores into maps."""
