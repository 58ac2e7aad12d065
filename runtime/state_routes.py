"""llama-server's routes that tell how it is set up and what its slots do: /props and /slots."""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter

from edgekd.runtime.api_answers import Slot
from edgekd.runtime.api_document import documented, with_and_without_v1
from edgekd.runtime.api_errors import ApiError
from edgekd.runtime.generation_settings import settings_of
from edgekd.runtime.native_requests import NativeRequest
from edgekd.runtime.openai_routes import Served
from edgekd.runtime.texts import Live

Json = dict[str, Any]


def add_state(router: APIRouter, served: Served) -> None:
    """Add the routes to ``router``."""
    texts = served.texts

    async def props() -> Json:
        found = await texts.describe()
        template = found["chat_template"]
        likely = _slot(served, 0, None)
        likely["next_token"] |= {"has_next_token": True, "stopping_word": ""}
        return {
            "default_generation_settings": likely | {"prompt": ""},
            "total_slots": texts.info.n_slots,
            "model_alias": served.alias,
            "model_path": found["file"],  # its name: where it lies is nobody's business
            "chat_template": template or "",
            "chat_template_caps": {"supports_tools": "tools" in (template or "")},
            "bos_token": found["special_tokens"].get("bos_token", ""),
            "eos_token": found["special_tokens"].get("eos_token", ""),
            "modalities": {"vision": False, "audio": False},
            "build_info": f"edgekd-{version('edgekd')}",
            "is_sleeping": False,
        }

    async def slots(fail_on_no_slot: str | None = None) -> list[Json]:
        snapshot, n_slots = texts.engine.snapshot, texts.info.n_slots
        held = snapshot.slot_tokens if snapshot else (0,) * n_slots
        # The last word of an idle engine may name a request that has ended since.
        ids = snapshot.slot_requests if snapshot else (None,) * n_slots
        running = [texts.live.get(each) if each else None for each in ids]
        if fail_on_no_slot and all(running):
            raise ApiError(503, "no slot is free", code="no_slot", type="server_error")
        return [
            _slot(served, slot, running[slot]) | {"n_tokens": held[slot]} for slot in range(n_slots)
        ]

    with_and_without_v1(router, "/props", props, "GET", documented(asks_model=True))
    with_and_without_v1(router, "/slots", slots, "GET", documented(list[Slot], asks_model=True))


def _slot(served: Served, slot: int, live: Live | None) -> Json:
    """Return a slot and the text in it; one without a text shows what a request gets unasked."""
    n_ctx = served.texts.info.context_tokens
    asked = live.asked if live else NativeRequest.model_validate({"prompt": ""})
    params = live.request.params if live else asked.sampling(n_ctx)
    return {
        "id": slot,
        "id_task": live.number if live else -1,
        "n_ctx": n_ctx,
        "speculative": False,
        "is_processing": live is not None,
        "params": settings_of(asked, params, n_ctx, served.alias),
        "next_token": {
            "has_next_token": live is not None,
            "has_new_line": live is not None and live.has_new_line,
            "n_remain": asked.limit() - live.n_decoded if live and asked.limit() >= 0 else -1,
            "n_decoded": live.n_decoded if live else 0,
        },
    }
