"""What stands before every route: the API key, the body limit, and the last word on exceptions. Plain ASGI.

Knows headers and bytes, no route but those that need no key. A body over the limit is refused while it streams in,
whether or not its length was announced.
"""

import hmac
import logging
from pathlib import Path

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.protocol import ApiError

log = logging.getLogger(__name__)


def read_keys(path: str | None) -> tuple[bytes, ...]:
    """The keys of a file, one a line; none where no file is given. Raises ValueError for a file without a key."""
    if path is None:
        return ()
    keys = tuple(line.strip().encode() for line in Path(path).read_text().splitlines() if line.strip())
    if not keys:
        raise ValueError(f"server.api_key_file: {path} holds no key, expected one a line")
    return keys


class Guard:
    def __init__(self, app: ASGIApp, keys: tuple[bytes, ...], max_body_bytes: int) -> None:
        self._app, self._keys, self._limit = app, keys, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, received = False, 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise self._too_large()
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, counted, noted)
        except ClientDisconnect:
            pass  # before its body had arrived: nobody is left to answer
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("%s %s failed", scope["method"], scope["path"])
                error = ApiError(500, "internal error")
            if not started:
                await respond(error, send)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        path = scope["path"]
        if self._keys and path != "/metrics" and path != "/health" and not path.startswith("/health/"):
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            # Every key is compared, so that the time says nothing about which one came close.
            known = sum(hmac.compare_digest(key.strip(), allowed) for allowed in self._keys)
            if scheme.lower() != b"bearer" or not known:
                raise ApiError(
                    401,
                    "a valid API key is needed: Authorization: Bearer <key>",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limit:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body exceeds {self._limit} bytes", code="body_too_large")


async def respond(error: ApiError, send: Send) -> None:
    headers = {"content-type": "application/json", **error.headers}
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": error.body()})
