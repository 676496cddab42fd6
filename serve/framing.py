"""How answers are framed on a connection: uvicorn's way, but for streams to HTTP/1.0 clients, which know no chunks.

Knows uvicorn and HTTP, nothing of what is answered.
"""

from functools import partial

from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle


class Protocol(HttpToolsProtocol):
    """A connection's protocol, for `uvicorn.Config(http=Protocol)`."""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = partial(until_close, app, cycle)
        super()._start_asgi_task(cycle, app)


async def until_close(
    app: ASGI3Application,
    cycle: RequestResponseCycle,
    scope: Scope,
    receive: ASGIReceiveCallable,
    send: ASGISendCallable,
) -> None:
    """Run `app` for one request; an answer without a length has no framing and ends where the connection is closed.

    uvicorn would send it in chunks. It closes the connection of an HTTP/1.0 client after any answer.
    """
    unframed = False

    async def send_unframed(message: ASGISendEvent) -> None:
        nonlocal unframed
        if message["type"] == "http.response.start":
            has_length = any(name == b"content-length" for name, _ in message.get("headers", []))
            unframed = cycle.scope["method"] != "HEAD" and not has_length
            if unframed:  # as for HEAD, uvicorn then writes the head alone, and ends the answer after the last message
                cycle.scope = cycle.scope.copy()
                cycle.scope["method"] = "HEAD"
        elif message["type"] == "http.response.body" and unframed:
            if cycle.flow.write_paused and not cycle.disconnected:
                await cycle.flow.drain()
            if not cycle.disconnected:
                cycle.transport.write(message.get("body", b""))
        await send(message)

    await app(scope, receive, send_unframed)
