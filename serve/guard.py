"""The middleware before every route: API keys, the size of bodies, and the reply to every exception. Plain ASGI.

Knows headers and bytes; of the routes only those that need no key. A body over the limit is refused while it streams
in, whether or not its length was announced.
"""

import hmac
import logging
from pathlib import Path

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.protocol import ApiError

log = logging.getLogger(__name__)


def read_keys(path: str | None) -> tuple[bytes, ...]:
    """The keys of a file, one a line; none where no file is given.

    Raises OSError for a file that cannot be read, ValueError for one without a key.
    """
    if path is None:
        return ()
    keys = tuple(line.strip().encode() for line in Path(path).read_text().splitlines() if line.strip())
    if not keys:
        raise ValueError(f"server.api_key_file: {path} holds no key, expected one a line")
    return keys


class Guard:
    """ASGI middleware; an ApiError that leaves the application, or any other exception, becomes the error object."""

    def __init__(self, app: ASGIApp, keys: tuple[bytes, ...], max_body_bytes: int) -> None:
        self._app, self._keys, self._limit = app, keys, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        response_started, body_bytes = False, 0

        async def limited_receive() -> Message:
            nonlocal body_bytes
            message = await receive()
            body_bytes += len(message.get("body", b""))
            if body_bytes > self._limit:
                raise self._too_large()
            return message

        async def noted_send(message: Message) -> None:
            nonlocal response_started
            response_started = True
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, limited_receive, noted_send)
        except ClientDisconnect:
            pass  # nobody is left to answer
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("%s %s failed", scope["method"], scope["path"])
                error = ApiError(500, "internal error")
            if not response_started:
                await respond(error, scope["path"], send)

    def _check(self, scope: Scope) -> None:
        """Raises ApiError: 401 without a valid key, 413 for a body announced as too large."""
        headers = dict(scope["headers"])
        path = scope["path"]
        if self._keys and path != "/metrics" and path != "/health" and not path.startswith("/health/"):
            scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
            given = (bearer.strip() if scheme.lower() == b"bearer" else b"", headers.get(b"x-api-key", b"").strip())
            # Every key is compared, so that the time does not reveal which one came close.
            if not sum(hmac.compare_digest(key, allowed) for key in given for allowed in self._keys):
                raise ApiError(
                    401,
                    "a valid API key is needed: Authorization: Bearer <key>, or x-api-key: <key>",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limit:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body exceeds {self._limit} bytes", code="body_too_large")


async def respond(error: ApiError, path: str, send: Send) -> None:
    """Answer a request for `path` with the error object."""
    headers = {"content-type": "application/json", **error.headers}
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": error.body(path)})
