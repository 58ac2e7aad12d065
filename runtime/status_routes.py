"""What the server says of itself: /health and /metrics."""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from edgekd.runtime.api_answers import Health
from edgekd.runtime.api_document import documented
from edgekd.runtime.api_errors import ApiError
from edgekd.runtime.serve_metrics import CONTENT_TYPE
from edgekd.runtime.texts import Texts


def status_routes(texts: Texts) -> APIRouter:
    """Return the routes that tell how ``texts`` is doing."""
    router = APIRouter(tags=["status"])

    @router.get("/health", responses=documented(Health))
    @router.get("/v1/health", include_in_schema=False)
    async def health() -> dict[str, str]:
        if texts.engine.state != "ready":
            message = f"the model is {texts.engine.state}; try again in a few seconds"
            raise ApiError(503, message, code="engine_unavailable", type="server_error")
        return {"status": "ok"}

    @router.get("/metrics", responses=documented(), response_class=PlainTextResponse)
    @router.get("/v1/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(texts.metrics.render(texts.engine), media_type=CONTENT_TYPE)

    return router
