"""The middleware before every route: API keys, the size of bodies, and the reply to every exception. Plain ASGI.

Knows headers and bytes; of the routes only those that need no key. A body over the limit is refused while it streams
in, whether or not its length was announced.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
from pathlib import Path

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.bulk import Bulk
from serve.protocol import ApiError

log = logging.getLogger(__name__)
COUNTED_BYTES = 32 * 1024  # of a body whose values are counted at once: 2 ms at most
JSON_TYPE = re.compile(r"application/([\w.-]+\+)?json")
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")  # one that a client may choose: no line of a log is forged by it


class Keys:
    """The API keys of a file, one a line; lines that begin with # are comments. Without a file, `all` is empty."""

    def __init__(self, path: str | None) -> None:
        """Raises OSError for a file that cannot be read, ValueError for one without a key."""
        self._path = path
        self.all: tuple[bytes, ...] = ()
        if path is not None:
            self.read()

    def read(self) -> int:
        """Read the file again; the number of keys. Raises as the constructor does, and then changes nothing."""
        assert self._path is not None
        lines = [line.strip() for line in Path(self._path).read_text("utf-8-sig").splitlines()]
        keys = tuple(line.encode() for line in lines if line and not line.startswith("#"))
        if not keys:
            raise ValueError(f"server.api_key_file: {self._path} holds no key, expected one a line")
        self.all = keys
        return len(keys)


def cache_salt(scope: Scope, given: str | None) -> bytes:
    """The salt of a request's cached pages: of the `cache_salt` it gives, and of its API key where that is configured.

    Empty where there is neither. Its hash is over fewer bytes than any page's, so that no salt is a page's digest.
    """
    key_salt: bytes = scope.get("key_salt", b"")
    if given is None and not key_salt:
        return b""
    return hashlib.sha256(
        b"salt" + key_salt + hashlib.sha256((given or "").encode("utf-8", "replace")).digest()
    ).digest()


def needs_key(path: str) -> bool:
    """Whether a path needs an API key, where there are any."""
    return path not in ("/metrics", "/health") and not path.startswith("/health/")


class Guard:
    """ASGI middleware; an ApiError that leaves the application, or any other exception, becomes the error object."""

    def __init__(
        self, app: ASGIApp, keys: Keys, max_body_bytes: int, salt_by_key: bool = True, json_type: bool = False
    ) -> None:
        self._app, self._keys, self._limit, self._salted = app, keys, max_body_bytes, salt_by_key
        self._json_type = json_type

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        id = given if REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        # HEAD where GET is: the server that sends the answer leaves its body out.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        scope = {**scope, "method": method, "request_id": id}
        response_started, body_bytes, bulk = False, 0, Bulk()

        async def limited_receive() -> Message:
            nonlocal body_bytes
            message = await receive()
            if piece := message.get("body", b""):
                body_bytes += len(piece)
                if body_bytes > self._limit:
                    raise self._too_large()
                for start in range(0, len(piece), COUNTED_BYTES):
                    if start:
                        await asyncio.sleep(0)
                    bulk.feed(piece[start : start + COUNTED_BYTES])
            return message

        async def noted_send(message: Message) -> None:
            nonlocal response_started
            response_started = True
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-request-id", id.encode())]}
            await send(message)

        try:
            key = self._key(headers) if self._keys.all and needs_key(scope["path"]) else None
            scope["key_digest"] = b"" if key is None else hashlib.sha256(key).digest()
            scope["key_salt"] = scope["key_digest"] if self._salted else b""
            self._check(method, headers)
            await self._app(scope, limited_receive, noted_send)
        except ClientDisconnect:
            pass  # nobody is left to answer
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("%s: %s %s failed", id, scope["method"], scope["path"])
                error = ApiError(500, "internal error")
            if not response_started:
                await respond(error, scope["path"], noted_send)

    def _key(self, headers: dict[bytes, bytes]) -> bytes:
        """The API key of a request. Raises ApiError 401 without a valid one."""
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = (bearer.strip() if scheme.lower() == b"bearer" else b"", headers.get(b"x-api-key", b"").strip())
        # Every key is compared, so that the time does not reveal which one came close.
        valid = [allowed for key in given for allowed in self._keys.all if hmac.compare_digest(key, allowed)]
        if valid:
            return valid[0]
        raise ApiError(
            401,
            "a valid API key is needed: Authorization: Bearer <key>, or x-api-key: <key>",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _check(self, method: str, headers: dict[bytes, bytes]) -> None:
        """Raises ApiError: 415 for a body that is compressed or no JSON, 413 for one announced as too large."""
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
        if encoding not in ("", "identity"):
            raise ApiError(415, f"content-encoding: got {encoding[:64]!r}, allowed: identity", "content-encoding")
        # Of other types, a browser sends a page's request to a foreign server without asking that server first.
        kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        foreign = kind if kind or b"origin" in headers else "application/json"
        if self._json_type and method == "POST" and not JSON_TYPE.fullmatch(foreign):
            raise ApiError(415, f"content-type: got {kind[:64]!r}, allowed: application/json", "content-type")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limit:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body exceeds {self._limit} bytes", code="body_too_large")


async def respond(error: ApiError, path: str, send: Send) -> None:
    """Answer a request for `path` with the error object."""
    body = error.body(path)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
