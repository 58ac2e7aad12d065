"""Whether an exception means that memory ran out: every library says it in its own way."""

import errno
import re

# torch, the C++ library, oneDNN, the dynamic linker, glibc, Python's threads, OpenBLAS, CPython.
_WORDS = re.compile(
    r"not enough memory|can't allocate memory|cannot allocate memory|out of memory|bad_alloc"
    r"|std::length_error|could not create a (primitive|memory)"
    r"|failed to map segment|can't start new thread|unable to allocate"
    r"|without exception set",
    re.IGNORECASE,
)
_KINDS = (RuntimeError, ImportError, OSError, SystemError)
ADVICE = (
    "out of memory; close other programs, allow more, or use a smaller model, "
    "fewer --ctx tokens or smaller rows"
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether ``error``, or what it was raised from, says that memory ran out."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, _KINDS) and _WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
