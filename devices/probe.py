"""How fast this machine reads memory: the bound of every token, measured in a second or two.

Each thread compares a block of its own with another of the same content, far larger than the
caches, by the C library's ``memcmp``: it only reads, it is vectorized everywhere, and ctypes
releases the interpreter's lock meanwhile. The fastest of some passes counts, since other programs
only slow down.
"""

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

_BLOCK_BYTES = 96 * 2**20
_PASSES = 8


def read_bandwidth_bytes_per_s(n_threads: int) -> float:
    """Return the bytes that ``n_threads`` read from memory in a second, taken together."""
    compare = _memcmp()
    blocks = [(bytearray(_BLOCK_BYTES), bytearray(_BLOCK_BYTES)) for _ in range(n_threads)]
    pointers = [tuple(_touch(block) for block in pair) for pair in blocks]
    best = 0.0
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(_PASSES):
            start_s = time.perf_counter()
            results = list(pool.map(lambda pair: compare(*pair, _BLOCK_BYTES), pointers))
            elapsed_s = time.perf_counter() - start_s
            assert not any(results), "equal blocks differ"
            best = max(best, 2 * n_threads * _BLOCK_BYTES / elapsed_s)
    return best


def _touch(block: bytearray) -> "ctypes.Array[ctypes.c_char]":
    """Return a pointer into ``block`` once every page of it is real memory of its own."""
    for page in range(0, len(block), 4096):
        block[page] = 1
    return (ctypes.c_char * len(block)).from_buffer(block)


def _memcmp() -> "ctypes._NamedFuncPointer":
    library = ctypes.CDLL("msvcrt") if hasattr(ctypes, "WinDLL") else ctypes.CDLL(None)
    function = library.memcmp
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    function.restype = ctypes.c_int
    return function
