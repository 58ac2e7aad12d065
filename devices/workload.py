"""What a model asks of a machine: bytes it keeps in memory and bytes it reads for every token."""

from dataclasses import dataclass, replace

from edgekd.errors import DeviceError

# Bits per weight with scales: of the matrices, and of embedding and head as edgekd exports them.
# The K-mixtures spend 6.5625 bits on half of the value and down projections, some 27 % of a Llama's
# weights; their averages are therefore near, not exact.
QUANT_BITS: dict[str, tuple[float, float]] = {
    "f32": (32, 32),
    "f16": (16, 16),
    "bf16": (16, 16),
    "q8_0": (8.5, 8.5),
    "q6_k": (6.5625, 6.5625),
    "q5_k_m": (5.64, 6.5625),
    "q4_1": (5.0, 8.5),
    "q4_k_m": (4.78, 6.5625),
    "q4_0": (4.5, 8.5),
}
_ALIASES = {"int4": "q4_0", "int8": "q8_0"}
_SMALL_BITS = 32  # norms and biases stay float32
_KV_VALUE_BYTES = 2  # llama.cpp's default cache is float16
# llama.cpp computes logits and activations of at most this many tokens at a time.
_BATCH_TOKENS = 512
# Interpreter, engine and their libraries, without a model.
_PROCESS_BYTES = 120_000_000


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One model in one form."""

    name: str
    format: str
    """Type of most of its weights: ``Q4_0``, ``F16``, or a quantization that is asked about."""
    n_body: int
    """Weights of all matrices but embedding and head."""
    n_head: int
    """Weights of the head; of a tied model those of its embedding."""
    n_embedding: int
    """Weights of an embedding of its own, of which a token reads one row; 0 where tied."""
    n_small: int
    """Norms and biases."""
    stored_bytes: int
    read_bytes: int
    """Weights read for one token."""
    kv_bytes_per_token: int
    """What one token leaves in the KV cache, which every later token reads."""
    vocab_size: int
    n_layers: int
    active_share: float = 1.0
    """Part of the body that a token uses; below 1 for a mixture of experts."""

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return self.n_body + self.n_head + self.n_embedding + self.n_small

    def read_bytes_at(self, depth_tokens: float) -> float:
        """Return the bytes read for one token with ``depth_tokens`` in the cache."""
        return self.read_bytes + depth_tokens * self.kv_bytes_per_token

    def overhead_bytes(self, context_tokens: int) -> int:
        """Return an estimate of what the engine needs besides weights and KV cache."""
        batch = min(_BATCH_TOKENS, context_tokens)
        return _PROCESS_BYTES + batch * self.vocab_size * 4

    def memory_bytes(self, context_tokens: int) -> int:
        """Return the bytes of memory that it takes with a cache of ``context_tokens``."""
        cache_bytes = context_tokens * self.kv_bytes_per_token
        return self.stored_bytes + cache_bytes + self.overhead_bytes(context_tokens)

    def in_quant(self, quant: str) -> "Workload":
        """Return the same model with its matrices stored as ``quant``.

        Raises:
            DeviceError: there is no such quantization.
        """
        name, (body_bits, outer_bits) = quant_bits(quant)
        body, small = self.n_body * body_bits / 8, self.n_small * _SMALL_BITS / 8
        outer = (self.n_head + self.n_embedding) * outer_bits / 8
        head = self.n_head * outer_bits / 8
        return replace(
            self,
            format=name.upper(),
            stored_bytes=round(body + outer + small),
            read_bytes=round(body * self.active_share + head + small),
        )

    def scaled(self, share: float) -> "Workload":
        """Return a model with ``share`` of the body and of the KV cache: fewer layers of it."""
        body = round(self.n_body * share)
        left_out = (self.n_body - body) * (self._body_bytes() / max(1, self.n_body))
        return replace(
            self,
            n_body=body,
            stored_bytes=round(self.stored_bytes - left_out),
            read_bytes=round(self.read_bytes - left_out * self.active_share),
            kv_bytes_per_token=round(self.kv_bytes_per_token * share),
            n_layers=max(1, round(self.n_layers * share)),
        )

    def _body_bytes(self) -> float:
        outer_bits = QUANT_BITS.get(self.format.lower(), (16, 16))[1]
        outer = (self.n_head + self.n_embedding) * outer_bits / 8
        return max(0.0, self.stored_bytes - outer - self.n_small * _SMALL_BITS / 8)


def quant_bits(quant: str) -> tuple[str, tuple[float, float]]:
    """Return the name of ``quant`` and its bits per weight: of the body, of embedding and head.

    Raises:
        DeviceError: there is no such quantization.
    """
    name = _ALIASES.get(quant.lower(), quant.lower())
    if name not in QUANT_BITS:
        known = ", ".join((*QUANT_BITS, *_ALIASES))
        raise DeviceError(f"unknown quantization {quant!r}; choose one of {known}")
    return name, QUANT_BITS[name]


def kv_bytes(n_layers: int, n_kv_heads: int, head_dim: int, value_bytes: int | None = None) -> int:
    """Return the bytes that one token takes in a cache of keys and values."""
    return 2 * n_layers * n_kv_heads * head_dim * (value_bytes or _KV_VALUE_BYTES)
