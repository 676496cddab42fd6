"""What one connection may cost: limits of heads, of bytes and of connections, and deadlines for clients that stall.

Knows uvicorn's protocol and HTTP, nothing of what is asked. What is refused here reaches no handler: the answer is the
error object, and the connection is closed.
"""

import asyncio
import logging

import httptools
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, Scope
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from conf.schema import ServerConfig
from serve.framing import Protocol
from serve.guard import needs_key, respond
from serve.protocol import ApiError

MAX_URL_BYTES = 16 * 1024
MAX_HEAD_BYTES = 64 * 1024  # of all headers, trailers included
MAX_HEADERS = 100
MAX_PIPELINED = 8  # requests that wait for the one before
RESERVED = 32  # connections beyond server.max_connections, which answer health and metrics
SLOWEST_BODY = 16 * 1024  # bytes a second, on average
LINGER_SECONDS = 2.0  # in which a refused client may read why, while what it goes on sending is dropped
HALF_CLOSED_SECONDS = 1.0  # in which an answer is still sent to a client that sends no more; then it counts as gone
LATE_SECONDS = 5.0  # after server.request_timeout, for its error to be read

log = logging.getLogger(__name__)


class Refused(Exception):
    """Leaves the parser's callbacks with the answer."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


class Connections:
    """What the connections of a server share: its limits, what is used of them, and the clock of the deadlines."""

    def __init__(self, server: ServerConfig) -> None:
        self.server = server
        self.body_bytes = 0  # of requests that are not answered yet
        self.open: dict[Connection, None] = {}  # oldest first
        self._clock: asyncio.TimerHandle | None = None
        self._interval = min(1.0, server.receive_timeout / 4, server.request_timeout / 4)

    def enter(self, connection: "Connection") -> int:
        """Count a connection; how many there are beyond the limit, after an unused one has made room."""
        loop = asyncio.get_running_loop()
        if len(self.open) >= self.server.max_connections:
            unused = next((other for other in self.open if other.unused), None)
            if unused:
                unused.leave_now()
        self.open[connection] = None
        if self._clock is None:
            self._clock = loop.call_later(self._interval, self._tick)
        return max(0, len(self.open) - self.server.max_connections)

    def leave(self, connection: "Connection") -> None:
        """Forget a connection that has ended."""
        self.open.pop(connection, None)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self.open):
            connection.check(now)
        self._clock = loop.call_later(self._interval, self._tick) if self.open else None


class Connection(Protocol):
    """A connection's protocol. `shared` is set by `protocol_of`."""

    shared: Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._refused = False
        self._over = False  # beyond max_connections
        self._active: RequestResponseCycle | None = None  # the request being answered
        self._active_since = 0.0
        self._receiving_since: float | None = self.loop.time()  # a request; None between requests
        self._received = 0  # bytes of that request's body
        self._head_bytes = self._header_count = 0
        self._unused_bytes = 0  # since a part of a message was complete
        self._held = 0  # of shared.body_bytes
        beyond = self.shared.enter(self)
        if beyond:
            self._over = True
            limit = self.shared.server.max_connections
            log.warning("server.max_connections: all %d are in use; more are answered 503", limit)
            if beyond > RESERVED:
                self.leave_now()

    def connection_lost(self, exc: Exception | None) -> None:
        self.shared.leave(self)
        self._release()
        # The request being answered may have others behind it: all of them have lost their client.
        for cycle in (self._active, *(cycle for cycle, _ in self.pipeline)):
            if cycle and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    @property
    def unused(self) -> bool:
        """Whether it only waits for a next request."""
        return self._receiving_since is None and (self._active is None or self._active.response_complete)

    def leave_now(self) -> None:
        """Close it and forget what is still to be sent."""
        self.shared.leave(self)
        self.transport.abort()

    def check(self, now: float) -> None:
        """Close it, or refuse its request, where a deadline has passed."""
        server = self.shared.server
        if self._refused or self.transport.is_closing():
            return
        busy = self._active is not None and not self._active.response_complete
        if busy and now - self._active_since > server.request_timeout + LATE_SECONDS:
            self.leave_now()  # it does not read
        elif self._receiving_since is not None:
            if self.scope is None and not self._unused_bytes:
                if now - self._receiving_since > server.receive_timeout:
                    self.transport.close()  # nothing was asked
                return
            seconds = server.receive_timeout
            if now - self._receiving_since > seconds + self._received / SLOWEST_BODY:
                self._refuse(ApiError(408, f"the request did not arrive within {seconds:g} s", code="timeout"))

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client sends no more. It may have gone, or wait for its answer."""
        if self._refused or self._receiving_since is not None or self.unused:
            return None  # closes the connection
        self.loop.call_later(HALF_CLOSED_SECONDS, self.transport.close)
        return True

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.leave_now()  # its last answer was never read
        else:
            super().timeout_keep_alive_handler()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unset_keepalive_if_required()
        self._unused_bytes += len(data)
        try:
            self.parser.feed_data(data)
            if self._unused_bytes > MAX_HEAD_BYTES and self._receiving_since is not None:
                raise Refused(_head_too_large())
        except Refused as refused:
            self._refuse(refused.error)
        except httptools.HttpParserCallbackError as error:
            if not isinstance(error.__context__, Refused):
                raise
            self._refuse(error.__context__.error)
        except httptools.HttpParserUpgrade:
            pass  # no other protocol is spoken here: the request is answered as it is
        except httptools.HttpParserError:
            self._refuse(ApiError(400, "the request is not valid HTTP"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._receiving_since, self._received = self.loop.time(), 0
        self._head_bytes = self._header_count = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            raise Refused(ApiError(414, f"the URL exceeds {MAX_URL_BYTES} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._unused_bytes = 0
        self._header_count += 1
        self._head_bytes += len(name) + len(value) + 4
        if self._header_count > MAX_HEADERS or self._head_bytes > MAX_HEAD_BYTES:
            raise Refused(_head_too_large())
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unused_bytes = 0
        super().on_headers_complete()
        if self.pipeline:
            if len(self.pipeline) > MAX_PIPELINED:
                raise Refused(ApiError(400, f"more than {MAX_PIPELINED} requests wait for an answer"))
            self.flow.resume_reading()  # otherwise nobody would notice that the client has gone

    def on_body(self, body: bytes) -> None:
        self._unused_bytes = 0
        self._received += len(body)
        self._held += len(body)
        self.shared.body_bytes += len(body)
        limit = self.shared.server.max_bytes_in_flight
        if self.shared.body_bytes > limit:
            log.warning("server.max_bytes_in_flight: all %d are in use; more are answered 503", limit)
            message = "the server holds as many bytes of requests as it may"
            raise Refused(ApiError(503, message, code="overloaded", headers={"Retry-After": "1"}))
        if self.cycle is not self._active and len(self.cycle.body) > HIGH_WATER_LIMIT:
            raise Refused(ApiError(413, "a request that waits for another has too large a body"))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unused_bytes = 0
        self._receiving_since = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._release()
        super().on_response_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._active, self._active_since = cycle, self.loop.time()
        cycle.keep_alive = cycle.keep_alive and not self._over
        if self._over and needs_key(cycle.scope["path"]):  # all but health and metrics
            app = _full
        super()._start_asgi_task(cycle, app)

    def _release(self) -> None:
        self.shared.body_bytes -= self._held
        self._held = 0

    def _refuse(self, error: ApiError) -> None:
        """Answer, unless another answer is under way, and close."""
        self._refused = True
        self._release()
        cycle = self._active
        answering = cycle is not None and cycle is not self.cycle and not cycle.response_complete
        if self.cycle and not self.cycle.response_complete:
            answering = answering or self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        if answering:
            self.leave_now()
            return
        body = error.body(self.scope.get("path", "") if self.scope else "")
        head = [STATUS_LINE[error.status], b"content-type: application/json\r\nconnection: close\r\n"]
        head += [f"{name.lower()}: {value}\r\n".encode() for name, value in error.headers.items()]
        self.transport.write(b"".join([*head, b"content-length: %d\r\n\r\n" % len(body), body]))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)


def _head_too_large() -> ApiError:
    return ApiError(431, f"the headers exceed {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} in number")


async def _full(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
    """The application of connections beyond the limit."""
    message = "the server has as many connections as it may"
    error = ApiError(503, message, code="overloaded", headers={"Retry-After": "1"})
    await respond(error, scope["path"], send)  # type: ignore


def protocol_of(server: ServerConfig) -> type[Connection]:
    """The protocol of a server's connections, for `uvicorn.Config(http=…)`."""

    class Limited(Connection):
        shared = Connections(server)

    return Limited
