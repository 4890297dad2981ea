"""Bytes of answers: chat and text completions, whole and streamed, in vLLM 0.32's shapes (recorded from it).

A stream's chunks differ in a few bytes only, so the rest is rendered once for each request: a chunk costs one
concatenation. Pure; writes nothing.
"""

import json
from typing import Any

import msgspec

from simulator.emulator.bodies import Choice, Generation

FINGERPRINT = "vllm-0.32.0-emulated"
DONE = b"data: [DONE]\n\n"


def _json(value: object) -> bytes:
    return msgspec.json.encode(value)


def choice_text(choice: Choice, begin: int, end: int) -> str:
    """Text of output tokens ``begin`` to ``end`` (exclusive) of a choice, as a client sees it."""
    if choice.text_characters is not None:  # a stop string cuts the text, perhaps inside a token
        before, after = len(choice.words.text(begin)), choice.words.text(end)
        return after[: choice.text_characters][before:]
    last = choice.output_tokens - 1
    ends_itself = choice.finish_reason == "stop" and end > last  # the end-of-sequence token has no text
    return "".join([choice.words.at(i) for i in range(begin, last if ends_itself else end)])


class StreamRenderer:
    """Events of one streamed request."""

    def __init__(self, generation: Generation, request_id: str, model: str, created: int) -> None:
        self._generation = generation
        kind = "chat.completion.chunk" if generation.chat else "text_completion"
        head = {"id": request_id, "object": kind, "created": created, "model": model}
        self._head = b"data: " + _json(head)[:-1] + b',"choices":['
        if generation.chat:
            self._before_text, self._after_text = b',"delta":{"content":', b'},"logprobs":null,"finish_reason":'
            self._going_on = b'null,"token_ids":null}]'
            self._ended = b'"%b","stop_reason":%b,"token_ids":null}]'
        else:
            self._before_text, self._after_text = b',"text":', b',"logprobs":null,"finish_reason":'
            self._going_on = b'null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]'
            self._ended = b'"%b","stop_reason":%b,"prompt_token_ids":null,"token_ids":null}]'
        self._prefixes = [
            b'%b{"index":%d%b' % (self._head, i, self._before_text) for i in range(len(generation.choices))
        ]
        self._open = self._after_text + self._going_on
        self._fingerprint = b',"system_fingerprint":"%b"' % FINGERPRINT.encode()

    def first(self, index: int) -> bytes:
        """What comes before a choice's first token: the role chunk of a chat, or the echoed prompt."""
        if self._generation.chat:
            delta = b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
            tail = b',"prompt_token_ids":null,"prompt_text":null}\n\n'
            return b'%b{"index":%d%b%b%b' % (self._head, index, delta, self._usage_so_far(0), tail)
        echo = self._generation.choices[index].echo
        return self._chunk(index, echo, b"") if echo else b""

    def tokens(self, index: int, begin: int, end: int) -> bytes:
        """Output tokens of a choice that goes on."""
        return self._chunk(index, choice_text(self._generation.choices[index], begin, end), self._usage_so_far(end))

    def _chunk(self, index: int, text: str, usage: bytes) -> bytes:
        return self._prefixes[index] + _json(text) + self._open + usage + b"}\n\n"

    def last(self, index: int, begin: int, end: int, finish_reason: str) -> bytes:
        """The rest of a choice's tokens, and why it ends."""
        choice = self._generation.choices[index]
        ended = self._ended % (finish_reason.encode(), json.dumps(choice.stop_reason).encode())
        # with a usage chunk to come, the fingerprint is there
        tail = self._usage_so_far(end) if self._generation.include_usage else self._fingerprint
        text = _json(choice_text(choice, begin, end))
        return self._prefixes[index] + text + self._after_text + ended + tail + b"}\n\n"

    def _usage_so_far(self, completion_tokens: int) -> bytes:
        if not self._generation.continuous_usage:
            return b""
        usage = {**_usage(self._generation.prompt_tokens, completion_tokens), "completion_tokens_details": None}
        return b',"usage":' + _json(usage)

    def end(self, completion_tokens: int) -> bytes:
        """The usage chunk, if it was asked for, and the end of the stream."""
        if not self._generation.include_usage:
            return DONE
        usage = _json(_usage(self._generation.prompt_tokens, completion_tokens))
        return b'%b],"usage":%b%b}\n\n%b' % (self._head, usage, self._fingerprint, DONE)


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def whole_answer(
    generation: Generation, request_id: str, model: str, created: int, ends: list[tuple[int, str]]
) -> bytes:
    """A completion at once; ``ends`` gives each choice's tokens and finish reason."""
    choices = [
        _whole_choice(generation.chat, index, choice, tokens, finish_reason)
        for index, (choice, (tokens, finish_reason)) in enumerate(zip(generation.choices, ends, strict=True))
    ]
    usage = _usage(generation.prompt_tokens, sum(tokens for tokens, _ in ends))
    answer: dict[str, Any] = {
        "id": request_id,
        "object": "chat.completion" if generation.chat else "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": {**usage, "prompt_tokens_details": None, "completion_tokens_details": None},
    }
    if generation.chat:
        answer |= {"prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None}
    return _json(answer | {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None})


def _whole_choice(chat: bool, index: int, choice: Choice, tokens: int, finish_reason: str) -> dict[str, Any]:
    text = choice.echo + choice_text(choice, 0, tokens)
    end = {"logprobs": None, "finish_reason": finish_reason, "stop_reason": choice.stop_reason, "token_ids": None}
    if not chat:
        more = {"prompt_logprobs": None, "prompt_token_ids": None, "routed_experts": None}
        return {"index": index, "text": text, **end, **more}
    message = {
        "role": "assistant",
        "content": text,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": None,
    }
    return {"index": index, "message": message, **end, "routed_experts": None}


def models_answer(model: str, max_model_len: int, created: int) -> bytes:
    """GET /v1/models."""
    permission = {
        "id": "modelperm-emulated",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    card = {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": model,
        "parent": None,
        "max_model_len": max_model_len,
        "permission": [permission],
    }
    return _json({"object": "list", "data": [card]})
