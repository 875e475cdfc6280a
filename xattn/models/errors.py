"""Exceptions that models raise and callers handle."""


class NothingToExplain(ValueError):
    """A recording cannot be explained: it is too long for the model, or the model wrote too few tokens for it."""
