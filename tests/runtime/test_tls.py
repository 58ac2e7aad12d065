"""HTTPS: what is refused at the start, and a real client that checks the certificate."""

import json
import os
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from edgekd.errors import RecipeError
from edgekd.runtime.server import ServeOptions

trustme = pytest.importorskip("trustme", reason="needs trustme; run: pip install --group dev")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """An authority's certificate, and a certificate with its key."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    paths = (folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    authority.cert_pem.write_to_path(str(paths[0]))
    for place, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(str(paths[1]), append=place > 0)
    issued.private_key_pem.write_to_path(str(paths[2]))
    return paths


def refusal(cert: Path | None, key: Path | None) -> str:
    with pytest.raises(RecipeError) as caught:
        ServeOptions(alias="tiny", tls_cert=cert, tls_key=key)
    return str(caught.value)


def test_files_that_cannot_be_served_with_are_refused(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, cert, key = pair
    assert "add the key" in refusal(cert, None)
    assert "add the certificate" in refusal(None, key)
    assert "No such file" in refusal(tmp_path / "nowhere.pem", key)
    assert "directory" in refusal(cert, tmp_path)
    assert "PEM" in refusal(key, key)
    text = tmp_path / "text.pem"
    text.write_text("hello")
    assert "PEM" in refusal(text, key) and "PEM" in refusal(cert, text)
    other = tmp_path / "other.pem"
    trustme.CA().issue_cert("127.0.0.1").private_key_pem.write_to_path(str(other))
    assert "does not belong" in refusal(cert, other)
    assert ServeOptions(alias="tiny", tls_cert=cert, tls_key=key).scheme == "https"


def test_an_encrypted_key_is_refused_and_asks_nobody(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization as forms

    key = forms.load_pem_private_key(pair[2].read_bytes(), None)
    locked = tmp_path / "locked.pem"
    password = forms.BestAvailableEncryption(b"password")
    locked.write_bytes(key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, password))
    assert "openssl pkey" in refusal(pair[1], locked)


def test_the_command_serves_https(float_gguf: Path, pair: tuple[Path, Path, Path]) -> None:
    authority, cert, key = pair
    command = [sys.executable, "-m", "edgekd", "serve", str(float_gguf), "--json", "--quiet"]
    command += ["--port", "0", "--parallel", "1", "--tls-cert", str(cert), "--tls-key", str(key)]
    command += ["--cors-origin", "https://a.example", "--cors-origin", "https://b.example"]
    command += ["--allowed-host", "a.example", "--allowed-host", "b.example"]
    environment = {name: value for name, value in os.environ.items() if name != "EDGEKD_API_KEY"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        try:
            announced = json.loads(process.stdout.readline())
            url = announced["url"]
            assert url.startswith("https://127.0.0.1:") and announced["page"] == url + "/"
            trusted = ssl.create_default_context(cafile=str(authority))
            for number in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
                trusted.minimum_version = trusted.maximum_version = number
                with httpx.Client(verify=trusted) as client:
                    own = {"Origin": url}
                    assert client.get(url + "/health", headers=own).json() == {"status": "ok"}
                    for name, status in (("b.example", 200), ("c.example", 403)):
                        called = client.get(url + "/health", headers={"Host": name})
                        assert called.status_code == status
                    listed = {"Origin": "https://b.example"}
                    answer = client.get(url + "/v1/models", headers=listed)
                    assert answer.headers["access-control-allow-origin"] == "https://b.example"
            with pytest.raises(httpx.HTTPError):
                httpx.get(url.replace("https", "http") + "/health")
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM  # uvicorn raises it again once all has ended
