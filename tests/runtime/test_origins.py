"""Whose pages may call the server, with real requests as browsers make them."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from edgekd.errors import RecipeError
from edgekd.runtime.page_routes import PAGE_PATHS
from edgekd.runtime.server import ServeOptions
from tests.runtime.serving import CHAT, HELLO, TEXT, Serving, refused, serving

LISTED = "https://app.example"
FOREIGN = [
    "https://evil.example",
    "https://app.example.evil.example",
    "http://app.example",
    "https://app.example:444",
    "http://127.0.0.1:1",
    "http://localhost",
    "null",
]
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
}


@pytest.fixture(scope="module")
def closed(float_gguf: Path) -> Iterator[Serving]:
    with serving(float_gguf) as found:
        yield found


@pytest.fixture(scope="module")
def shared(float_gguf: Path) -> Iterator[Serving]:
    options = ServeOptions(alias="tiny", api_key="secret", cors_origins=(LISTED,))
    with serving(float_gguf, options) as found:
        yield found


@pytest.mark.parametrize("origin", [*FOREIGN, LISTED])
def test_no_foreign_page_is_let_in_by_default(closed: Serving, origin: str) -> None:
    headers = {"Origin": origin}
    assert "--cors-origin" in refused(
        closed.post(TEXT, HELLO, headers=headers), 403, "origin_not_allowed"
    )
    refused(closed.get("/v1/models", headers=headers), 403, "origin_not_allowed")
    preflight = httpx.options(closed.url + CHAT, headers=headers | PREFLIGHT)
    assert preflight.status_code == 403
    assert "access-control-allow-origin" not in preflight.headers


def test_the_servers_own_page_and_programs_are_let_in(closed: Serving) -> None:
    for headers in ({}, {"Origin": closed.url}):
        assert closed.post(CHAT, HELLO | {"max_tokens": 2}, headers=headers).status_code == 200


def test_a_name_rebound_to_loopback_is_refused_though_it_is_its_own_origin(closed: Serving) -> None:
    headers = {"Origin": "http://evil.example:8080", "Host": "evil.example:8080"}
    refused(closed.post(CHAT, HELLO, headers=headers), 403, "host_not_allowed")


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_list_lets_in_nobody_else(shared: Serving, origin: str) -> None:
    headers = {"Origin": origin, "Authorization": "Bearer secret"}
    refused(shared.post(CHAT, HELLO, headers=headers), 403, "origin_not_allowed")
    preflight = httpx.options(shared.url + CHAT, headers={"Origin": origin} | PREFLIGHT)
    assert preflight.status_code == 403


def test_a_listed_page_may_ask_and_read_the_answer(shared: Serving) -> None:
    origin = {"Origin": LISTED}
    preflight = httpx.options(shared.url + CHAT, headers=origin | PREFLIGHT)  # without the key
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == LISTED
    assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
    headers = origin | {"Authorization": "Bearer secret"}
    answer = shared.post(CHAT, HELLO | {"max_tokens": 2}, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == LISTED
    assert "access-control-allow-credentials" not in answer.headers
    keyless = shared.post(CHAT, HELLO, headers=origin)
    refused(keyless, 401, "invalid_api_key")
    assert keyless.headers["access-control-allow-origin"] == LISTED


@pytest.mark.parametrize(
    "origin", ["*", "null", "app.example", "https://app.example/", "HTTPS://a.b", "", "https://"]
)
def test_what_is_no_origin_is_refused_before_anything_starts(origin: str) -> None:
    with pytest.raises(RecipeError, match="origin"):
        ServeOptions(alias="tiny", cors_origins=(LISTED, origin))


def test_the_pages_files_need_no_key_and_carry_the_policy(shared: Serving) -> None:
    for path in PAGE_PATHS:
        answer = shared.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; ")
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        again = shared.get(path, headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304 and not again.content
        assert httpx.head(shared.url + path).status_code == 200


@pytest.mark.parametrize(
    "path", ["/page/", "/page/../server.py", "/page/..%2fserver.py", "/page/index.html", "/page"]
)
def test_nothing_of_a_url_becomes_a_path(closed: Serving, path: str) -> None:
    refused(closed.get(path), 404, "not_found")


def test_every_file_of_the_page_is_served() -> None:
    from edgekd.runtime import page_routes

    files = {file.name for file in (Path(page_routes.__file__).parent / "page").iterdir()}
    inside_reports = {"report.css"}
    assert files == set(page_routes._OURS.values()) | inside_reports


def test_the_engines_memory_is_measured(closed: Serving) -> None:
    import psutil

    (line,) = [
        line
        for line in closed.get("/metrics").text.splitlines()
        if line.startswith("edgekd_engine_resident_bytes ")
    ]
    child = closed.engine._child
    assert child
    resident_bytes = psutil.Process(child.process.pid).memory_info().rss
    assert float(line.split()[1]) == pytest.approx(resident_bytes, rel=0.2)
