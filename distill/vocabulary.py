"""Whether teacher and student speak the same tokens, judged by what the tokens are.

Widths prove nothing: Qwen2.5 pads one vocabulary to 151,936 and to 152,064 rows, and two
tokenizers of equal width can give every text different ids.
"""

import hashlib
import json

from edgekd.errors import VocabularyError
from edgekd.runtime.tokenizer import FileTokenizer

_PROBES = (
    "The year 1984, 3.14159 and 1,000,000 \u2014 don't they'LL  \u00b2\u00bd\r\n\ttab",
    "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f389",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|></s>",
    "def f(x):\n        return x**2  # code\n",
)


def common_vocabulary(student: FileTokenizer, teacher: FileTokenizer) -> int:
    """Return how many ids both tokenizers share: every id below stands for the same bytes.

    Raises:
        VocabularyError: they differ; the first difference and both hashes are named.
    """
    ours, theirs = _token_table(student), _token_table(teacher)
    n_common = min(len(ours), len(theirs))
    for token_id in range(n_common):
        if ours[token_id] != theirs[token_id]:
            raise _mismatch(
                ours,
                theirs,
                f"id {token_id} is {ours[token_id]!r} here, {theirs[token_id]!r} there",
            )
    for text in _PROBES:
        if (mine := student.encode(text)) != (other := teacher.encode(text)):
            raise _mismatch(ours, theirs, f"{text[:20]!r} gives {mine[:6]} here, {other[:6]} there")
    return n_common


def vocabulary_size(tokenizer: FileTokenizer) -> int:
    """Return one more than the largest id of ``tokenizer``; models may pad beyond it."""
    return tokenizer.n_ids


def vocabulary_sha256(tokenizer: FileTokenizer) -> str:
    """Return a hash of the id to bytes table of ``tokenizer``."""
    return _hash(_token_table(tokenizer))


def _token_table(tokenizer: FileTokenizer) -> list[bytes]:
    return [tokenizer.raw_token_bytes(i) for i in range(vocabulary_size(tokenizer))]


def _hash(table: list[bytes]) -> str:
    return hashlib.sha256(json.dumps([token.hex() for token in table]).encode()).hexdigest()


def _mismatch(ours: list[bytes], theirs: list[bytes], what: str) -> VocabularyError:
    return VocabularyError(
        f"student and teacher tokenize differently: {what} (student {_hash(ours)[:12]}, "
        f"teacher {_hash(theirs)[:12]}); choose a student of the teacher's family"
    )
