"""Asks a running gateway for its operator's routes."""

import httpx

from dynamollm.errors import UserError


def fetch(url: str, path: str, api_key: str | None, method: str = "GET", **query: float) -> bytes:
    """The JSON at ``/admin/{path}`` of the gateway at ``url``. Raises ``UserError`` saying what to do."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    address = f"{url.rstrip('/').removesuffix('/v1')}/admin/{path}"
    try:
        ask = httpx.post if method == "POST" else httpx.get
        answer = ask(address, params=query, headers=headers, timeout=30.0, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"--url {url}: {error or type(error).__name__}; is a gateway running there?") from None
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise UserError(f"--url {url}: the gateway wants an API key it knows: give --api-key or set OPENAI_API_KEY")
    if answer.status_code == httpx.codes.CONFLICT:
        raise UserError(str(answer.json()["error"]["message"]))
    if not answer.is_success:
        raise UserError(
            f"--url {url}: /admin/{path} answers with status {answer.status_code}; is it a dynamollm gateway?"
        )
    return answer.content
