"""What every JSON body that the server takes has in common: strict types, bounded sizes.

Imports pydantic, so only the server imports this.
"""

import json
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from edgekd.runtime.sampling import MAX_SEED

MAX_DEPTH = 64
"""Nesting of JSON, as for grammars; templates and schemas are walked recursively."""
MAX_STOPS = 16
MAX_BIASES = 1024

Json = dict[str, Any]
_NULL = {"type": "null"}
StopString = Annotated[str, Field(min_length=1, max_length=128)]
Stops = StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, le=MAX_SEED)]
Positive = Annotated[int, Field(ge=1, le=MAX_SEED)]


class Asked(BaseModel):
    """JSON of a request: null is left out; unknown fields are refused, never ignored in silence."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    ignored: ClassVar[frozenset[str]] = frozenset()
    """Fields that do not change the answer."""
    without_effect: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Unsupported fields, and the values with which they ask for what is done anyway."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_has_no_effect(cls, found: Any) -> Any:
        if not isinstance(found, dict):
            return found
        kept = {name: value for name, value in found.items() if cls._counts(name, value)}
        if unknown := sorted(kept.keys() - cls._known()):
            raise ValueError(
                f"not supported: {', '.join(unknown)[:200]}; "
                "leave out what this server cannot honor"
            )
        return {name: value for name, value in kept.items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return what is accepted: null wherever a field may be left out, and fields in vain."""
        found = handler.resolve_ref_schema(handler(core))
        fields: Json = found.setdefault("properties", {})
        for name in fields.keys() - set(found.get("required", ())):
            fields[name] = _or_null(fields[name])
        for name in cls.ignored:
            fields[name] = {"description": "Accepted; changes nothing."}
        for name, values in cls.without_effect.items():
            fields[name] = {"enum": [*values, None], "description": "Other values are refused."}
        found["additionalProperties"] = {"type": "null"}
        return found

    @classmethod
    def _known(cls) -> set[str]:
        return {field.alias or name for name, field in cls.model_fields.items()}

    @classmethod
    def _counts(cls, name: str, value: Any) -> bool:
        if name in cls._known():
            return True
        idle = cls.without_effect.get(name, ())
        is_idle = name in cls.ignored or any(_is_same(value, each) for each in idle)
        return not (value is None or is_idle)


class AskedBody(Asked):
    """A whole body."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_no_text(cls, found: Any) -> Any:
        if isinstance(found, bytes):  # FastAPI's way to say that it was not sent as JSON
            raise ValueError("the body is not JSON; send it with Content-Type: application/json")
        if is_deeper(found, MAX_DEPTH):
            raise ValueError(f"the body is nested deeper than {MAX_DEPTH}; flatten it")
        try:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair; send plain text") from None
        return found


def _is_same(value: Any, other: Any) -> bool:
    """Whether two values are the same JSON: true is not 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _or_null(schema: Json) -> Json:
    """Return the JSON schema of null or what ``schema`` describes."""
    kept = {name: schema.pop(name) for name in ("title", "default") if name in schema}
    options = schema.pop("anyOf") if schema.keys() == {"anyOf"} else [schema]
    return {"anyOf": [*options, *([] if _NULL in options else [_NULL])]} | kept


def is_deeper(found: Any, depth: int) -> bool:
    """Whether lists and objects in ``found`` are nested more than ``depth`` times."""
    layer = [found]
    for _ in range(depth + 1):
        layer = [
            each
            for value in layer
            if isinstance(value, dict | list)
            for each in (value.values() if isinstance(value, dict) else value)
        ]
        if not layer:
            return False
    return True
