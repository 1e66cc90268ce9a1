"""An HTTP server on this machine for the time of a test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar

Hub = TypeVar("Hub")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that ends without closing its connections is nothing to report."""


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], make: Callable[[str], Hub]) -> Iterator[Hub]:
    """Runs it; gives what ``make`` makes of its address, which handlers find as ``server.hub``."""
    server = _Server(("127.0.0.1", 0), handler)
    server.hub = make(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
