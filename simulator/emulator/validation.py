"""Bodies checked for JSON and types, with vLLM 0.32's words for what is wrong (pydantic's, as it repeats them)."""

import json
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError

from simulator.emulator.errors import ApiError, bad_request

MAX_LISTED_ERRORS = 10
B = TypeVar("B", bound=BaseModel)


def _type_errors(error: ValidationError) -> ApiError:
    lines = []
    first = "body"
    found = error.errors(include_url=False)
    for position, item in enumerate(found):
        # a union's members are named in brackets in the location; vLLM leaves them out
        parts = [str(p) for p in item["loc"] if not (isinstance(p, str) and ("[" in p or p == "str"))]
        location = ".".join(["body", *parts])
        if position == 0:
            first = location
        line: dict[str, Any] = {
            "type": item["type"],
            "loc": location,
            "msg": item["msg"],
            "input": shown(item["input"]),
        }
        if "ctx" in item:
            line["ctx"] = item["ctx"]
        lines.append(f"  {line}")
    return listed(lines, first)


def listed(lines: list[str], param: str | None) -> ApiError:
    """One error of several lines, the first few of them."""
    more = len(lines) - MAX_LISTED_ERRORS
    shown = lines[:MAX_LISTED_ERRORS] + ([f"  ...and {more} more errors"] if more > 0 else [])
    plural = "s" if len(lines) > 1 else ""
    return ApiError(400, "Bad Request", f"{len(lines)} validation error{plural}:\n" + "\n".join(shown), param)


def shown(value: object) -> str:
    """A wrong value, as an error repeats it."""
    if isinstance(value, list | dict):
        return f"<{type(value).__name__} of {len(value)} items>"
    return str(value)


def decode_json(raw: bytes, content_type: str) -> Any:
    """The body as JSON. Raises ``ApiError`` as vLLM's first checks do."""
    if content_type.split(";")[0].strip().lower() != "application/json":
        raise listed(["  Unsupported Media Type: Only 'application/json' is allowed"], None)
    try:
        decoded = msgspec.json.decode(raw) if raw else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        decoded = _decode_slowly(raw)
    if decoded is None:
        line = {"type": "missing", "loc": "body", "msg": "Field required", "input": "None"}
        raise listed([f"  {line}"], "body")
    return decoded


def _decode_slowly(raw: bytes) -> Any:
    """The standard library takes a little more (NaN) and says where it stopped, in the words vLLM repeats."""
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        where = f"body.{error.pos}"
        line = {
            "type": "json_invalid",
            "loc": where,
            "msg": "JSON decode error",
            "input": "<dict of 0 items>",
            "ctx": {"error": error.msg},
        }
        raise listed([f"  {line}"], where) from None
    except UnicodeDecodeError:
        raise bad_request("There was an error parsing the body") from None


def validated(kind: type[B], decoded: Any) -> B:
    """The body as this kind. Raises ``ApiError``."""
    if not isinstance(decoded, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        line = {"type": "model_attributes_type", "loc": "body", "msg": message, "input": shown(decoded)}
        raise listed([f"  {line}"], "body")
    try:
        return kind.model_validate(decoded)
    except ValidationError as error:
        raise _type_errors(error) from None
