"""By which names a server may be called, with real requests."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from edgekd.errors import RecipeError
from edgekd.runtime.host_names import allowed_names
from edgekd.runtime.server import ServeOptions
from tests.runtime.serving import Serving, refused, serving

KEY = {"Authorization": "Bearer secret"}
NETWORK = "0.0.0.0"


@pytest.fixture(scope="module")
def named(float_gguf: Path) -> Iterator[Serving]:
    """A server that says it listens on the network, and names what it may be called by."""
    options = ServeOptions(
        alias="tiny", host=NETWORK, api_key="secret", allowed_hosts=("models.example", "fd00::1")
    )
    with serving(float_gguf, options) as found:
        yield found


def models(server: Serving, host: str) -> httpx.Response:
    return server.get("/v1/models", headers=KEY | {"Host": host})


@pytest.mark.parametrize("host", ["evil.example", "models.example.evil.example", "fd00::2", ""])
def test_other_names_than_the_allowed_are_refused_on_the_network(named: Serving, host: str) -> None:
    assert "--allowed-host" in refused(models(named, host), 403, "host_not_allowed")
    refused(named.get("/", headers={"Host": host}), 403, "host_not_allowed")


@pytest.mark.parametrize(
    "host", ["models.example", "Models.Example:443", "[fd00::1]:8080", "localhost:1", NETWORK]
)
def test_allowed_names_and_the_servers_own_are_served(named: Serving, host: str) -> None:
    assert models(named, host).status_code == 200


def test_without_a_list_the_network_may_use_any_name_and_loopback_may_not() -> None:
    assert allowed_names(NETWORK, ()) is None
    local = frozenset({"localhost", "127.0.0.1", "[::1]", "127.0.0.2"})
    assert allowed_names("127.0.0.2", ()) == local
    assert allowed_names("127.0.0.2", ("me.example",)) == local | {"me.example"}


@pytest.mark.parametrize(
    "name",
    ["", "*", "a.example:80", "http://a.example", "a.example/", "a b", ".", "[fd00::1]:80", "é.de"],
)
def test_what_is_no_host_is_refused_before_anything_starts(name: str) -> None:
    with pytest.raises(RecipeError, match="is no host; name each as a browser does"):
        ServeOptions(alias="tiny", allowed_hosts=("models.example", name))
