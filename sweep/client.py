"""Streams completions over HTTP and counts their tokens: the `Send` with which a sweep loads a real server."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from sweep.load import Send, SendError
from sweep.workload import Request


class Choice(msgspec.Struct):
    token_ids: list[int] = []


class Event(msgspec.Struct):
    """The fields of a stream's event that are read here; the decoder skips all others."""

    choices: list[Choice] = []
    error: dict[str, Any] | None = None


@asynccontextmanager
async def http_sender(url: str, model: str, temperature: float) -> AsyncIterator[Send]:
    """A `Send` over keep-alive connections, one for each request in progress.

    It raises SendError for an HTTP error, a broken connection, an error event, and a stream without its end marker.
    """
    decode = msgspec.json.Decoder(Event).decode
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def send(request: Request) -> AsyncGenerator[int, None]:
            body = {
                "model": model,
                "prompt": request.prompt,
                "max_tokens": request.output_tokens,
                "stream": True,
                "temperature": temperature,
                "seed": request.seed,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            try:
                async with session.post(f"{url}/v1/completions", json=body) as response:
                    if response.status != 200:
                        raise SendError(f"HTTP {response.status}: {(await response.text())[:200]}")
                    buffered = b""
                    async for block in response.content.iter_any():
                        *events, buffered = (buffered + block).split(b"\n\n")
                        for line in events:
                            if line == b"data: [DONE]":
                                return
                            event = decode(line.removeprefix(b"data: "))
                            if event.error:
                                raise SendError(str(event.error.get("message")))
                            if tokens := sum(len(choice.token_ids) for choice in event.choices):
                                yield tokens
            except (aiohttp.ClientError, msgspec.MsgspecError) as error:
                raise SendError(f"{type(error).__name__}: {error}") from error
            raise SendError("the stream ended early")

        yield send
