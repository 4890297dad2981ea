"""What the OpenAPI document says of the relayed routes. Documentation only: no request is ever parsed with these."""

from typing import Any

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["integer", "string"]},
            },
        }
    },
}
_SHARED: dict[str, Any] = {
    "model": {"type": "string", "description": "May be left out where one model is served."},
    "stream": {"type": "boolean", "default": False},
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": {"type": "boolean"}, "include_energy": {"type": "boolean"}},
    },
    "max_tokens": {"type": "integer", "minimum": 1},
    "n": {"type": "integer", "minimum": 1, "default": 1},
    "service_tier": {"type": "string", "enum": ["auto", "default", "flex", "priority"]},
    "nvext": {"type": "object", "description": "agent_hints.osl: expected length of the answer in tokens."},
}
_HEADERS = {
    "x-llm-d-slo-ttft-ms": "Target of the time to first token in ms; bad values are ignored.",
    "x-llm-d-slo-tpot-ms": "Target of the time between tokens in ms; bad values are ignored.",
    "x-llm-d-inference-fairness-id": "Tenant.",
    "x-llm-d-inference-objective": "Name of a configured priority class.",
    "x-request-id": "Comes back with the answer; made up where absent.",
}
_STATUSES = {
    400: "The request is wrong; `param` names the field.",
    401: "No or a wrong API key.",
    404: "The model is not served.",
    413: "The body is too large.",
    429: "All instances are busy; see `Retry-After`.",
    502: "The instance failed.",
    503: "Nothing can serve this now.",
    504: "A deadline passed.",
}


def relayed_operation(required: str, own: dict[str, Any]) -> dict[str, Any]:
    """The ``openapi_extra`` of a relayed route."""
    body = {"type": "object", "required": [required], "properties": {**own, **_SHARED}, "additionalProperties": True}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "parameters": [
            {"name": name, "in": "header", "required": False, "description": text, "schema": {"type": "string"}}
            for name, text in _HEADERS.items()
        ],
        "responses": {
            "200": {
                "description": "The instance's answer, or its stream of events.",
                "content": {
                    "application/json": {"schema": {"type": "object"}},
                    "text/event-stream": {"schema": {"type": "string"}},
                },
            },
            **{
                str(status): {"description": text, "content": {"application/json": {"schema": _ERROR}}}
                for status, text in _STATUSES.items()
            },
        },
    }


CHAT_OPERATION = relayed_operation(
    "messages",
    {
        "messages": {"type": "array", "items": {"type": "object"}},
        "max_completion_tokens": {"type": "integer", "minimum": 1},
    },
)
COMPLETION_OPERATION = relayed_operation(
    "prompt",
    {
        "prompt": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    },
)
