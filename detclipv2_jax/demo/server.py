"""The HTTP side of the page: a few fixed addresses, bounded requests, and nobody else's pages as clients."""

from __future__ import annotations

import http.server
import importlib.resources
import ipaddress
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from absl import logging

from detclipv2_jax.demo import album as album_lib
from detclipv2_jax.demo.answers import Answers, BusyError

MAX_JSON_BYTES = 100_000
MAX_UPLOAD_S = 60.0  # for the body of a request
IDLE_S = 20.0  # without a byte
MAX_CONNECTIONS = 16  # at once; more are closed
FILES = {
    "/": ("page.html", "text/html"),
    "/labels.js": ("labels.js", "text/javascript"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
HEADERS = {
    # nothing from elsewhere, in no other page, nothing kept
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class RefusedError(Exception):
    """A request that gets no answer but a status and a sentence."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Server(http.server.ThreadingHTTPServer):
    """Serves the page at `address` until it is shut down."""

    daemon_threads = True

    def __init__(self, answers: Answers, *, host: str, port: int):
        folder = importlib.resources.files(__package__) / "page"
        self.pages = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}
        self.answers = answers
        self.only_here = is_loopback(host)
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    @property
    def address(self) -> str:
        """Returns the page's address."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logging.debug("a connection broke", exc_info=True)  # the browser went away


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    timeout = IDLE_S
    server_version, sys_version = "detclipv2_jax", ""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        logging.debug(format, *args)

    def _answer(self, method: Callable[[str], tuple[bytes, str]]) -> None:
        try:
            self._check_sender()
            body, kind, status = *method(urllib.parse.urlsplit(self.path).path), 200
        except (RefusedError, ValueError, BusyError, TimeoutError) as error:
            status = error.status if isinstance(error, RefusedError) else 400
            status = {BusyError: 503, TimeoutError: 408, album_lib.UnknownPhotoError: 404}.get(type(error), status)
            body, kind = _json({"error": str(error)}), "application/json"
        except Exception:
            logging.exception("the page asked for %s", self.path)
            body, kind, status = (
                _json({"error": "this went wrong here; the terminal says more"}),
                "application/json",
                500,
            )
        self.send_response(status)
        text = "; charset=utf-8" if kind.startswith("text/") else ""
        for name, value in {"Content-Type": kind + text, "Content-Length": str(len(body)), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _check_sender(self) -> None:
        """Refuses requests that other sites make a browser send, under their name or, by DNS, under ours."""
        host = self.headers.get("Host", "")
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        if self.server.only_here and not is_loopback(name):
            raise RefusedError(403, f"this page is at {self.server.address}, not at {name[:80]!r}")
        origin = self.headers.get("Origin")
        if origin not in (None, f"http://{host}"):
            raise RefusedError(403, "only the page itself may ask")

    def _get(self, path: str) -> tuple[bytes, str]:
        if path in self.server.pages:
            return self.server.pages[path]
        if path == "/api/start":
            return _json(self.server.answers.start()), "application/json"
        _, kind, photo_id = path.split("/") if path.count("/") == 2 else ("", "", "")
        if kind in album_lib.LONG_SIDES:
            long_side = album_lib.LONG_SIDES[kind]
            return self.server.answers.album.jpeg(photo_id, long_side=long_side), "image/jpeg"
        raise RefusedError(404, "there is nothing at this address")

    def _post(self, path: str) -> tuple[bytes, str]:
        answers = self.server.answers
        if path == "/api/upload":
            data = self._body("application/octet-stream", max_bytes=album_lib.MAX_UPLOAD_BYTES)
            name = urllib.parse.unquote(self.headers.get("X-Name", "photo"))
            return _json(answers.upload(data, name=name)), "application/json"
        methods = {"/api/find": answers.find, "/api/align": answers.align, "/api/picture": answers.picture}
        if path not in methods:
            raise RefusedError(404, "there is nothing at this address")
        try:
            request = json.loads(self._body("application/json", max_bytes=MAX_JSON_BYTES))
        except (ValueError, RecursionError):
            raise ValueError("the request is no JSON") from None
        if not isinstance(request, dict):
            raise ValueError("the request must be a JSON object")
        result = methods[path](request)
        return (result, "image/png") if isinstance(result, bytes) else (_json(result), "application/json")

    def _body(self, kind: str, *, max_bytes: int) -> bytes:
        """Returns the content of a request."""
        if self.headers.get_content_type() != kind:
            raise RefusedError(415, f"the content must be {kind}")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise RefusedError(411, "the request does not say how long it is")
        if len(length) > 12 or int(length) > max_bytes:
            raise RefusedError(413, f"that is too large: at most {max_bytes / 1e6:g} MB")
        parts, missing, end = list[bytes](), int(length), time.monotonic() + MAX_UPLOAD_S
        while missing:
            if time.monotonic() > end:
                raise TimeoutError(f"the content did not come within {MAX_UPLOAD_S:.0f} s")
            if not (part := self.rfile.read1(min(missing, 1 << 16))):
                raise RefusedError(400, "the content ended too early")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)


def _json(content: Any) -> bytes:
    return json.dumps(content).encode()
