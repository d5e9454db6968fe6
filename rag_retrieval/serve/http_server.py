"""uvicorn around the application, and how it stops: finish what is inside, refuse what is new, end with 0.

What a reader would get wrong: uvicorn itself would close its port at once and end by the signal. Here the port stays
open while requests are inside, so that new ones get a 503 that says why, and a load balancer sees /health turn.
"""

import logging
import math
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from rag_retrieval.serve.admission import Admission

KEEP_ALIVE = 30  # seconds that an idle connection stays open: longer than those of clients' pools, which are 5 to 15
GRACE = 5  # seconds beyond the time-out of requests in which their answers are sent

log = logging.getLogger(__name__)


class GracefulServer(uvicorn.Server):
    """Stops at SIGTERM or SIGINT once nothing is inside; at a second one at once."""

    def __init__(self, config: uvicorn.Config, admission: Admission):
        super().__init__(config)
        self.admission = admission

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # not uvicorn's own: it would raise the signal again at the end, and the exit code would not be 0
        if self.admission.stopping:
            self.should_exit = self.force_exit = True
        self.admission.stopping = True

    async def on_tick(self, counter: int) -> bool:
        done = self.admission.stopping and self.admission.requests == 0
        return await super().on_tick(counter) or done


def bound_socket(host: str, port: int) -> socket.socket:
    """Bound and not listening, so that clients are refused until the model is there. Raises OSError."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --host or --port"
        ) from error
    return opened


def address_of(opened: socket.socket) -> str:
    """`http://127.0.0.1:8080`."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(app: Starlette, admission: Admission, opened: socket.socket, timeout: float) -> None:
    """Serve until a signal. timeout: seconds that a request may take."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(timeout) + GRACE,
    )
    log.info("listening on %s", address_of(opened))
    GracefulServer(config, admission).run(sockets=[opened])
    log.info("stopped")
