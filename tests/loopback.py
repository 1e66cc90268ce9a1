"""An HTTP server on this machine for the time of a test."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, TypeVar

Hub = TypeVar("Hub")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that ends without closing its connections is nothing to report."""


class Answering(BaseHTTPRequestHandler):
    """A handler that knows how to answer, and says nothing on the terminal."""

    protocol_version = "HTTP/1.1"
    server: Any

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


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
