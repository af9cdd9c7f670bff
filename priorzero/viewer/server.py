"""Shows the page of a run that goes on, to browsers of this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)


def make_server(
    port: int, stamp: Callable[[], str], page: Callable[[], str]
) -> ThreadingHTTPServer:
    """A server on 127.0.0.1; `serve_forever` of it answers.

    Args:
        port: 0 takes a free one.
        stamp: of the present data; changes when they do.
        page: makes the page of the present data.

    Raises:
        PriorZeroError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        """`/` is the page, `/stamp` tells whether a newer one is to be had."""

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path not in ("/", "/stamp"):
                self.send_error(404)
                return
            try:
                text = stamp() if path == "/stamp" else page()
            except PriorZeroError as error:  # the run has just begun, or its folder is gone
                logger.error("Error: %s", error)
                self._answer(503, "text/plain", str(error))
                return
            self._answer(200, "text/plain" if path == "/stamp" else "text/html", text)

        def _answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments) -> None:
            logger.debug(format, *arguments)

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise PriorZeroError(
            f"port {port} cannot be used ({error}); name another with --port, or 0 for a free one"
        ) from error
