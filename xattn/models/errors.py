"""Exceptions that models raise and callers handle, and those of the Hugging Face hub."""

from huggingface_hub.errors import HfHubHTTPError, HFValidationError

HUB_ERRORS = (OSError, HfHubHTTPError, HFValidationError)  # of a download


class NothingToExplain(ValueError):
    """A recording cannot be explained: it is too long for the model, or the model wrote too few tokens for it."""


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
