"""The one exception type a user is meant to read, and when memory has run out."""


class SlipstreamError(ValueError):
    """Bad input, told in one line: what is wrong, where, and what would be right."""


def out_of_memory(error: BaseException) -> bool:
    """Whether this says that memory ran out, of a card or of the machine, for which torch has no type of its own."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )
