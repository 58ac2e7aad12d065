"""A thin HTTP client for benchmarks: one completion as a stream, with a time for every part of it.

It costs the two cores that the servers share with it as little as Python allows.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Heard:
    """What came of one request."""

    begun_s: float
    parts_s: list[float] = field(default_factory=list)
    """When each part with text arrived."""
    n_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        """Seconds to the first part."""
        return self.parts_s[0] - self.begun_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between parts."""
        return [b - a for a, b in zip(self.parts_s, self.parts_s[1:], strict=False)]


async def complete(
    url: str, body: dict[str, Any], stop_after: int | None = None, at_most_s: float | None = None
) -> Heard:
    """Stream one completion to its end, or hang up after so many parts or seconds."""
    heard = Heard(time.perf_counter())
    reader, writer = await _send(url, "/v1/completions", body | {"stream": True})
    try:
        async for part in _events(reader):
            choices = part.get("choices") or [{}]
            if choices[0].get("text"):
                heard.parts_s.append(time.perf_counter())
                heard.n_tokens += 1
            if part.get("usage"):
                heard.n_tokens = part["usage"]["completion_tokens"]
            if stop_after is not None and len(heard.parts_s) >= stop_after:
                break
            if at_most_s is not None and time.perf_counter() - heard.begun_s > at_most_s:
                break
    finally:
        writer.close()
    return heard


async def complete_all(url: str, bodies: Sequence[dict[str, Any]]) -> tuple[list[Heard], float]:
    """Return what came of ``bodies``, sent at once, and the seconds until the last one ended."""
    begun_s = time.perf_counter()
    heard = await asyncio.gather(*(complete(url, body) for body in bodies))
    return list(heard), time.perf_counter() - begun_s


async def get_json(url: str, route: str) -> Any:
    """Return the JSON at ``route``."""
    reader, writer = await _send(url, route, None)
    try:
        await reader.readuntil(b"\r\n\r\n")
        return json.loads(await reader.read())
    finally:
        writer.close()


async def _send(
    url: str, route: str, body: dict[str, Any] | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    raw = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{'GET' if body is None else 'POST'} {route} HTTP/1.1\r\nHost: localhost\r\n"
        f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    writer.write(head.encode() + raw)
    await writer.drain()
    return reader, writer


async def _events(reader: asyncio.StreamReader) -> Any:
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status.decode()} {(await reader.read()).decode()[-500:]}")
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])
