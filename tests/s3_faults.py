"""An HTTP proxy on loopback between a client and an S3 server that breaks a seeded share of the exchanges.

It passes every header on as the client sent it, `Host` too, since that is part of the signature; and it counts requests
by operation, so that a test can say how many a piece of work may cost. One thread a connection.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO
from urllib.parse import parse_qs, urlsplit

FAULTS = ("slow_down", "internal_error", "lost_answer", "drop_before", "drop_body", "short_body", "delay")
REFUSALS = {"slow_down": ("SlowDown", "503 Slow Down"), "gone_after": ("NoSuchUpload", "404 Not Found")}
HOP_HEADERS = ("connection", "expect", "transfer-encoding", "content-length")


@dataclass(frozen=True)
class FaultPlan:
    """What the proxy breaks.

    Attributes:
        rate: share of the requests that are broken, in [0, 1].
        faults: what may happen: `slow_down` (503) and `internal_error` (500) instead of the request; `lost_answer`: the
            request is done and answered with 500; `drop_before`: the connection ends instead; `drop_body`: it ends amid
            the body; `short_body`: a part of the body under a Content-Length that fits it; `delay`; and
            where asked for, `gone_after`: the request is done and answered with 404 NoSuchUpload, as a second
            completion is.
        operations: only these are broken; all when empty.
        max_faults: so many at most; without a limit when None.
        seed: of the draws.
        delay_s: how long a delay takes.
    """

    rate: float = 0.0
    faults: tuple[str, ...] = FAULTS
    operations: frozenset[str] = frozenset()
    max_faults: int | None = None
    seed: int = 0
    delay_s: float = 0.05


@dataclass
class FaultProxy:
    """A running proxy and what it saw.

    Attributes:
        counts: requests by operation.
        body_bytes: bytes of the server's answers by operation, those that did not go through included.
        faults: what was broken, by kind.
        on_fault: called with the operation after a broken exchange, before its connection ends.
    """

    server_url: str
    plan: FaultPlan
    endpoint_url: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    body_bytes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    on_fault: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.plan.seed)
        self.lock = threading.Lock()

    def draw(self, operation: str) -> str:
        """Count a request and return the fault that happens to it; empty for none."""
        plan = self.plan
        with self.lock:
            self.counts[operation] += 1
            is_over = plan.max_faults is not None and self.faults.total() >= plan.max_faults
            is_spared = bool(plan.operations) and operation not in plan.operations
            if self.random.random() >= plan.rate or is_over or is_spared:
                return ""
            fault = self.random.choice(plan.faults)
            self.faults[fault] += 1
        return fault

    def cut(self, num_bytes: int) -> int:
        """Return how many of a body's bytes go through before it breaks."""
        with self.lock:
            return self.random.randrange(num_bytes) if num_bytes else 0


@contextlib.contextmanager
def fault_proxy(server_url: str, plan: FaultPlan = FaultPlan()) -> Iterator[FaultProxy]:
    """Run a proxy before `server_url` (`http://host:port`) and yield it."""
    proxy = FaultProxy(server_url, plan)
    with _Server(("127.0.0.1", 0), _Connection) as server:
        server.proxy = proxy
        proxy.endpoint_url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()


def operation_of(method: str, target: str) -> str:
    """Return the S3 operation of a request, as botocore names it."""
    parts = urlsplit(target)
    query = parse_qs(parts.query, keep_blank_values=True)
    is_bucket = parts.path.strip("/").count("/") == 0
    if "uploadId" in query or "uploads" in query:
        of_upload = {
            "PUT": "upload_part",
            "DELETE": "abort_multipart_upload",
            "GET": "list_multipart_uploads",
            "POST": "create_multipart_upload" if "uploads" in query else "complete_multipart_upload",
        }
        return of_upload[method]
    if is_bucket and method == "GET":
        return "list_objects_v2"
    return {"GET": "get", "HEAD": "head", "PUT": "put", "DELETE": "delete", "POST": "post"}[method] + (
        "_bucket" if is_bucket else "_object"
    )


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False  # idle connections that a client keeps open
    allow_reuse_address = True
    request_queue_size = 128
    proxy: FaultProxy


class _Connection(socketserver.StreamRequestHandler):
    server: _Server
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            while self._exchange():
                pass

    def _exchange(self) -> bool:
        """Pass one request on; whether the connection goes on."""
        line = self.rfile.readline().decode("latin-1").split()
        if len(line) != 3:
            return False
        method, target, _ = line
        headers = http.client.parse_headers(self.rfile)
        if headers.get("Expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = _read_body(self.rfile, headers)
        operation = operation_of(method, target)
        fault = self.server.proxy.draw(operation)
        goes_on = self._pass_on(method, target, headers, body, operation=operation, fault=fault)
        if fault and self.server.proxy.on_fault is not None:
            self.server.proxy.on_fault(operation)
        return goes_on

    def _pass_on(
        self, method: str, target: str, headers: http.client.HTTPMessage, body: bytes, *, operation: str, fault: str
    ) -> bool:
        if fault == "drop_before":
            return False
        if fault in ("slow_down", "internal_error"):
            return self._refuse(method, fault)
        if fault == "delay":
            time.sleep(self.server.proxy.plan.delay_s)
        status, reason, answer_headers, answer = _forward(self.server.proxy.server_url, method, target, headers, body)
        self.server.proxy.body_bytes[operation] += len(answer)
        if fault in ("lost_answer", "gone_after"):
            return self._refuse(method, fault)
        return self._answer(method, f"{status} {reason}", answer_headers, answer, fault=fault)

    def _answer(self, method: str, status: str, headers: list[tuple[str, str]], body: bytes, *, fault: str) -> bool:
        sent = body
        if fault in ("drop_body", "short_body"):
            sent = body[: self.server.proxy.cut(len(body))]
        lines = [f"{name}: {value}" for name, value in headers if name.lower() not in HOP_HEADERS]
        length = {name.lower(): value for name, value in headers}.get("content-length", "0")
        promised = length if method == "HEAD" else str(len(sent if fault == "short_body" else body))
        head = "\r\n".join([f"HTTP/1.1 {status}", *lines, f"Content-Length: {promised}"]) + "\r\n\r\n"
        self.wfile.write(head.encode("latin-1") + (b"" if method == "HEAD" else sent))
        return fault != "drop_body"

    def _refuse(self, method: str, fault: str) -> bool:
        code, status = REFUSALS.get(fault, ("InternalError", "500 Internal Server Error"))
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        return self._answer(method, status, [("Content-Type", "application/xml")], body, fault="")


def _read_body(file: BinaryIO, headers: http.client.HTTPMessage) -> bytes:
    if headers.get("Transfer-Encoding", "").lower() != "chunked":
        return file.read(int(headers.get("Content-Length", 0)))
    body = b""
    while size := int(file.readline().split(b";")[0], 16):
        body += file.read(size)
        file.readline()
    file.readline()
    return body


def _forward(
    server_url: str, method: str, target: str, headers: http.client.HTTPMessage, body: bytes
) -> tuple[int, str, list[tuple[str, str]], bytes]:
    connection = http.client.HTTPConnection(urlsplit(server_url).netloc, timeout=60)
    try:
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            if name.lower() not in HOP_HEADERS:
                connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.putheader("Connection", "close")
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.reason, answer.getheaders(), answer.read()
    finally:
        connection.close()
