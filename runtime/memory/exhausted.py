"""What an out-of-memory looks like: torch, cuBLAS and cuDNN have a way each to say it. Torch-free."""

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, of a GPU or of the machine."""
    # By name and text: torch may not be imported, and its allocators raise plain RuntimeErrors too.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)
