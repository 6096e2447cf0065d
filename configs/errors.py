"""The one exception type a user is meant to read."""


class SlipstreamError(ValueError):
    """Bad input, told in one line: what is wrong, where, and what would be right."""
