"""Servers of buckets on this machine, from PyPI: moto for S3, gcp-storage-emulator for Google's, behind one proxy.

The proxy breaks answers on purpose, and does what Google's servers do and the emulator does not: conditions of writes,
the version of what is read, the ends of a listing.
"""

import contextlib
import http.client
import http.server
import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
import urllib.parse

import portpicker

from detclipv2_jax import bucket_store, buckets

BUCKET = "bucket-of-tests"
ARE_THERE = all(importlib.util.find_spec(name) for name in ("moto", "flask_cors", "gcp_storage_emulator"))
COMMANDS = {
    "gs": [
        "gcp_storage_emulator",
        "start",
        "--host=127.0.0.1",
        "--port={}",
        "--in-memory",
        f"--default-bucket={BUCKET}",
    ],
    "s3": ["moto.server", "-H", "127.0.0.1", "-p", "{}"],
}
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "GOOGLE_AUTH_TOKEN_FOR_TESTING": "c"}


class Server:
    """A server of one scheme; `fault(method, path)` says how an answer goes wrong: 503, 403, cut, slow or not ("")."""

    def __init__(self, scheme):
        self.scheme, self.fault, self.requests = scheme, lambda method, path: "", []
        self.writing, self.asking = threading.Lock(), threading.Lock()
        self.port = portpicker.pick_unused_port()
        command = [sys.executable, "-m", *(part.format(self.port) for part in COMMANDS[scheme])]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.proxy = Proxy(("127.0.0.1", 0), type("Of", (Handler,), {"server_of": self}))
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.proxy.server_port}"
        for _ in range(200):
            with contextlib.suppress(OSError):
                status = self.ask("PUT", f"/{BUCKET}")[0] if scheme == "s3" else self.ask("GET", "/storage/v1/b")[0]
                if status == 200:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"no {scheme} server")

    def ask(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with self.asking, contextlib.closing(connection):  # several at once are more than they take
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def environment(self):
        name = "AWS_ENDPOINT_URL" if self.scheme == "s3" else "TENSORSTORE_GCS_HTTP_URL"
        return CREDENTIALS | {name: self.url}

    def close(self):
        self.proxy.shutdown()
        self.proxy.server_close()
        self.process.kill()
        self.process.wait()


class Proxy(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # of 5, the others are cut


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self):
        server = self.server_of
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.requests.append((self.command, self.path))
        fault = server.fault(self.command, self.path)
        if fault in ("503", "403"):
            return self.send(int(fault), [], b"")
        if fault == "slow":
            time.sleep(1)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("connection",)}
        with server.writing if self.command != "GET" else contextlib.nullcontext():
            status, found, data = (google if server.scheme == "gs" else plain)(
                server, self.command, self.path, body, headers
            )
        self.send(status, found, data, cut=fault == "cut")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815  (their names)

    def send(self, status, headers, data, *, cut=False):
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True


def plain(server, method, path, body, headers):
    return server.ask(method, path, body, headers)


def google(server, method, path, body, headers):
    """What Google's servers answer; https://cloud.google.com/storage/docs/request-preconditions."""
    where = urllib.parse.urlsplit(path)
    query = {name: values[0] for name, values in urllib.parse.parse_qs(where.query).items()}
    if method == "GET" and where.path.endswith("/o"):
        status, found, data = server.ask("GET", where.path)
        if status != 200:
            return status, found, b'{"error": {"code": 404}}'
        items = json.loads(data).get("items") or []
        start, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        kept = sorted((item for item in items if start <= item["name"] < end), key=lambda item: item["name"])
        return 200, found, json.dumps({"items": kept}).encode()
    name = query.get("name") or urllib.parse.unquote(where.path.partition("/o/")[2])
    bucket = re.search(r"/b/([^/]+)", where.path)[1]
    status, _, data = server.ask("GET", f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}")
    now = json.loads(data)["generation"] if status == 200 else "0"
    if query.get("ifGenerationMatch", now) != now:
        return 412, [], b"{}"
    if query.get("ifGenerationNotMatch") == now != "0":
        return 304, [], b""
    try:
        status, found, data = server.ask(method, path, body, headers)
    except http.client.RemoteDisconnected:
        return 404, [], b"{}"
    return status, [*found, ("x-goog-generation", now)], data


@contextlib.contextmanager
def served(scheme):
    """Yields a server of a scheme, where tests can ask it."""
    server = Server(scheme)
    try:
        yield server
    finally:
        server.close()


def url(scheme, key):
    return f"{scheme}://{BUCKET}/{key}"


@contextlib.contextmanager
def asked(server, cache, monkeypatch):
    """A server that works, asked with little patience, for an empty cache; without faults afterwards."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DETCLIP_BUCKET_CACHE", str(cache))
    monkeypatch.setenv("DETCLIP_BUCKETS_SINCE", repr(time.time()))
    monkeypatch.setattr(bucket_store, "_RETRIES", {"max_retries": 3, "initial_delay": "10ms", "max_delay": "50ms"})
    bucket_store._opened.cache_clear()
    buckets._meter.cache_clear()
    server.fault = lambda method, path: ""
    yield
    server.fault = lambda method, path: ""
    bucket_store._opened.cache_clear()
