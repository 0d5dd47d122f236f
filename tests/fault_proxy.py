"""A proxy in front of a real S3 server that fails as networks and busy servers do, at seeded points."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["slow_down", "error", "reset", "lost_reply", "cut", "short", "stall", "whole"]
"""Of the request: answered 503 SlowDown or 500, connection reset, done but its answer never sent. Of a body:
half of it and then the end of the connection; half of it, with headers that say so (of ranges only: nothing tells
of it otherwise); half of it and silence; the whole object instead of the range."""

BODY_FAULTS: tuple[Fault, ...] = ("cut", "short", "stall")
MOST_IN_A_ROW = 3

_BREAKABLE: dict[Fault, tuple[int, ...]] = {"cut": (200, 206), "short": (206,), "stall": (200, 206)}
_ERRORS = {"slow_down": (503, "SlowDown"), "error": (500, "InternalError")}


class FaultProxy:
    """``http://`` proxy at ``url``. Only what tests tell it to break is broken, and ``injected`` counts it."""

    def __init__(self, upstream: str, *, stall_s: float) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.stall_s = stall_s
        self.knows_conditions = True
        """Whether conditional writes are passed on, or answered 501."""
        self.injected: Counter[Fault] = Counter()
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._planned: list[tuple[str, Fault]] = []
        self._random, self._rate, self._kinds, self._in_a_row = random.Random(), 0.0, (), 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def break_next(self, method: str, *faults: Fault) -> None:
        """The next requests of that HTTP method fail, one fault each."""
        self._planned += [(method, fault) for fault in faults]

    def break_some(self, rate: float, kinds: Sequence[Fault], *, seed: int) -> None:
        """From now on each request fails with that probability, but never more than MOST_IN_A_ROW."""
        self._random, self._rate, self._kinds, self._in_a_row = random.Random(seed), rate, tuple(kinds), 0

    def fault(self, method: str) -> Fault | None:
        """What is to happen to the request that has come in."""
        with self._lock:
            self.requests[method] += 1
            for planned in self._planned:
                if planned[0] == method:
                    self._planned.remove(planned)
                    return planned[1]
            if self._in_a_row >= MOST_IN_A_ROW or self._random.random() >= self._rate:
                self._in_a_row = 0
                return None
            self._in_a_row += self._rate < 1
            return self._random.choice(self._kinds)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def fault_proxy(upstream: str, *, stall_s: float = 5.0) -> Iterator[FaultProxy]:
    proxy = FaultProxy(upstream, stall_s=stall_s)
    try:
        yield proxy
    finally:
        proxy.stop()


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        assert "Transfer-Encoding" not in self.headers, "chunked uploads are not passed on"
        fault = self.proxy.fault(self.command)
        conditional = self.command in ("PUT", "DELETE") and {"If-Match", "If-None-Match"} & set(self.headers)
        if fault in _ERRORS or (conditional and not self.proxy.knows_conditions):
            status, code = _ERRORS.get(fault, (501, "NotImplemented"))
            if fault:
                self._count(fault)
            text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            self._answer(status, {"Content-Type": "application/xml"}, text, len(text))
        elif fault == "reset":
            self._count(fault)
            self._reset()
        else:
            status, headers, content, length = self._ask_upstream(body, whole=fault == "whole")
            if fault == "whole":
                self._count(fault)
                self._answer(status, headers, content, length)
            elif fault == "lost_reply":
                self._count(fault)
                self._reset()
            elif fault in BODY_FAULTS and status in _BREAKABLE[fault] and len(content) > 1:
                self._count(fault)
                half = content[: len(content) // 2]
                self._answer(status, headers, half, len(half) if fault == "short" else length)
                if fault == "stall":
                    time.sleep(self.proxy.stall_s)
                self.close_connection = fault != "short"
            else:
                self._answer(status, headers, content, length)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests' own output tells enough."""

    def _count(self, fault: Fault) -> None:
        with self.proxy._lock:
            self.proxy.injected[fault] += 1

    def _ask_upstream(self, body: bytes, *, whole: bool) -> tuple[int, dict[str, str], bytes, int]:
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection", "range" if whole else ""):
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            content = response.read()
            length = int(response.headers.get("Content-Length") or len(content))
            return response.status, dict(response.headers), content, length
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
            self.wfile.flush()

    def _reset(self) -> None:
        """Closes so that the other side sees a reset and no proper end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
