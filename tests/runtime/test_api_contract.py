"""schemathesis against our own OpenAPI document: no 5xx, and every answer as it says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from edgekd.runtime.engine_process import EngineProcess
from edgekd.runtime.server import ServeOptions, create_app
from tests.runtime.serving import Serving, serving

# What fits the document may still be impossible, such as tool_choice without tools.
REFUSED = [400, 404, 413, 422]
N_EXAMPLES = 40


@pytest.fixture(scope="module")
def server(float_gguf: Path) -> Iterator[Serving]:
    with serving(float_gguf, context_tokens=48) as found:
        yield found


def document() -> Any:
    """Return what the app says of itself, which needs no engine."""
    app = create_app(cast(EngineProcess, None), ServeOptions(alias="tiny"))
    config = schemathesis.Config.from_dict(
        {"checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", *REFUSED]}}}
    )
    return schemathesis.openapi.from_dict(app.openapi(), config=config)


schema = document()


@schema.parametrize()  # type: ignore[untyped-decorator]
@settings(
    max_examples=N_EXAMPLES,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_as_the_document_says(case: Any, server: Serving) -> None:
    case.call_and_validate(base_url=server.url, timeout=30)
