"""Every message that docs/troubleshooting.md quotes is one that the code can give."""

import ast
import re
from collections.abc import Iterator

import pytest

from edgekd import errors
from edgekd.runtime.api_errors import _CODES, _FAILURES
from tests.docs.pages import ROOT

ROW = re.compile(r"^\| `([^`]+)` \| (.+) \|$", re.MULTILINE)
SOURCES = [
    path
    for folder in ("distill", "export", "runtime", "devices", "src/edgekd")
    for path in sorted((ROOT / folder).glob("*.py"))
]
QUOTED = [match[1] for match in ROW.finditer((ROOT / "docs/troubleshooting.md").read_text("utf-8"))]


def texts_in(tree: ast.AST) -> Iterator[str]:
    """Yield every text in the code, with … for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


TEXTS = [text for path in SOURCES for text in texts_in(ast.parse(path.read_text("utf-8")))]


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_exists(message: str) -> None:
    assert any(message in text for text in TEXTS), "the code says something else by now"


def test_every_class_of_error_is_treated() -> None:
    """A new kind of error needs a line; what the user cannot meet alone is left out."""
    raised = {
        (node.func.id, text)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args
        for text in texts_in(node.args[0])
    }
    kinds = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.EdgekdError)
    }
    treated = {name for name, text in raised for message in QUOTED if message in text}
    # Its message stands in errors.py; QueueFullError is the server's 429.
    without = {"EdgekdError", "MissingExtraError", "QueueFullError"}
    assert kinds - treated <= without


def test_every_code_of_the_http_api_is_explained_with_its_status() -> None:
    page = (ROOT / "docs/serve.md").read_text("utf-8")
    explained = set(re.findall(r"^\| (\d{3}) \| `(\w+)` \|", page, re.MULTILINE))
    answered = {(str(status), code) for code, (status, _) in _FAILURES.items()}
    answered |= {(str(status), code) for status, code in _CODES.items()}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ApiError":
                code = next((each.value for each in node.keywords if each.arg == "code"), None)
                status = node.args[0]
                if isinstance(code, ast.Constant) and isinstance(status, ast.Constant):
                    answered.add((str(status.value), str(code.value)))
    assert explained == answered
