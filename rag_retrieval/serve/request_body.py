"""Waiting for a client within a deadline: for its body, and for work that is of use only while it is there.

What a reader would get wrong: a Content-Length may lie or be missing, so the bytes are counted as they come.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from rag_retrieval.serve.refusal import Refusal

Result = TypeVar("Result")


async def read_body(request: Request, most_bytes: int, deadline: float) -> bytes:
    """deadline: on the clock of the event loop. Raises Refusal (413, 408), and ClientDisconnect."""
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > most_bytes:
        raise too_large(most_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout_at(deadline):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most_bytes:
                    raise too_large(most_bytes)
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive in time; {len(body)} bytes came") from None
    return bytes(body)


def too_large(most_bytes: int) -> Refusal:
    return Refusal(413, f"the body is larger than {most_bytes} bytes; send fewer or shorter documents at a time")


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result], deadline: float) -> Result:
    """What `work` gives. It is cancelled when the client leaves (raises ClientDisconnect) and when the time is over
    (raises Refusal, 504)."""
    left = deadline - asyncio.get_running_loop().time()
    task, gone = asyncio.create_task(work), asyncio.create_task(client_gone(request))
    try:
        await asyncio.wait((task, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientDisconnect
        raise Refusal(504, "no scores in time; the server is busy or the request is large: try again or send less")
    finally:
        task.cancel()
        gone.cancel()


async def client_gone(request: Request) -> None:
    """Returns when the client has closed the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
