"""Misbehavior on request, and the record of what was asked: one ASGI layer around the Hub."""

import asyncio
import json
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from re import search
from typing import Any, Literal, get_args
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

Kind = Literal["cut", "status", "slow", "wrong_range", "ignore_range", "corrupt"]


@dataclass(kw_only=True)
class Fault:
    """One kind of misbehavior, for the next `times` requests that it fits (None: for ever), after `skip` good ones.

    Args:
        kind: `cut` closes the connection after `at` bytes of the body (of the answer to a GET, of the request
            otherwise) though Content-Length promised more. `corrupt` flips the byte at `at` of an answer. `status`
            answers `status` (and `Retry-After`). `slow` waits `delay` seconds, then moves bodies at
            `bytes_per_second`. `wrong_range` shifts `Content-Range` by one. `ignore_range` answers 200 and the
            whole file.
        path: glob over the decoded path of the request (`*` crosses slashes), or a regular expression if `regex`.
        method: GET, HEAD, PUT, ...; None for all. Only requests that a kind can touch count: `cut` and `corrupt` need
            a body longer than `at`, the two range kinds a Range header.
    """

    kind: Kind
    path: str = "*"
    regex: bool = False
    method: str | None = None
    times: int | None = 1
    skip: int = 0
    at: int = 0
    status: int = 503
    retry_after: float | None = None
    bytes_per_second: float | None = None
    delay: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"Unknown fault {self.kind!r}; known: {', '.join(get_args(Kind))}")

    def fits(self, method: str, path: str) -> bool:
        """Whether method and path are meant."""
        return self.method in (None, method) and matches(self.path, path, regex=self.regex)


@dataclass(kw_only=True)
class RequestRecord:
    """One request as the Hub saw it. `bytes_served` counts what was handed to the socket, headers left out."""

    method: str
    path: str
    query: str
    range: str | None
    user_agent: str | None
    authorized: bool
    status: int = 0
    bytes_served: int = 0
    bytes_received: int = 0
    fault: str | None = None


def matches(pattern: str, path: str, *, regex: bool = False) -> bool:
    """Whether a path fits a glob or, somewhere in it, a regular expression."""
    return search(pattern, path) is not None if regex else fnmatchcase(path, pattern)


def bytes_served(records: Iterable[RequestRecord], path: str = "*") -> int:
    """Bytes of the answers to requests whose path fits the glob."""
    return sum(record.bytes_served for record in records if matches(path, record.path))


class Controls:
    """The faults that wait for their requests, and the last requests; safe to use from any thread."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._records: deque[RequestRecord] = deque(maxlen=100_000)
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        """Arm a fault."""
        with self._lock:
            self._faults.append(fault)

    def clear_faults(self) -> None:
        """Behave from now on."""
        with self._lock:
            self._faults.clear()

    def faults(self) -> list[Fault]:
        """The faults still armed."""
        with self._lock:
            return list(self._faults)

    def take(self, kinds: set[str], method: str, path: str, length: int | None = None) -> Fault | None:
        """The fault that this request meets, if any; `length` of a body that may be cut or corrupted."""
        with self._lock:
            for fault in self._faults:
                if fault.kind not in kinds or not fault.fits(method, path):
                    continue
                if length is not None and fault.kind in ("cut", "corrupt") and length <= fault.at:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                if fault.times is not None:
                    fault.times -= 1
                    if fault.times <= 0:
                        self._faults.remove(fault)
                return fault
        return None

    def record(self, record: RequestRecord) -> None:
        """Remember a request; the record changes while the request is served."""
        with self._lock:
            self._records.append(record)

    def requests(self) -> list[RequestRecord]:
        """All requests since the start or the last `clear_requests`, oldest first."""
        with self._lock:
            return list(self._records)

    def clear_requests(self) -> None:
        """Forget the requests."""
        with self._lock:
            self._records.clear()


class Misbehavior:
    """ASGI layer that records requests and plays the armed faults. Paths below `/_local/` are exempt."""

    def __init__(self, app: ASGIApp, controls: Controls) -> None:
        self.app = app
        self.controls = controls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        # uvicorn's send is a method of an object that knows the socket: cutting and noticing a closed one need it.
        scope["transport"] = send.__self__.transport  # type: ignore[attr-defined]
        path = unquote(scope["raw_path"].decode("ascii"))
        if path.startswith("/_local/"):
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(self.controls, scope, receive, send, path)
        await exchange.play(self.app)


class _Exchange:
    def __init__(self, controls: Controls, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        self.controls = controls
        self.scope = scope
        self.inner_receive = receive
        self.inner_send = send
        self.path = path
        self.method: str = scope["method"]
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        self.upload = int(headers.get(b"content-length", "0"))
        self.record = RequestRecord(
            method=self.method,
            path=path,
            query=scope["query_string"].decode("ascii", "replace"),
            range=headers.get(b"range"),
            user_agent=headers.get(b"user-agent"),
            authorized=b"authorization" in headers,
        )
        self.fault: Fault | None = None

    async def play(self, app: ASGIApp) -> None:
        self.controls.record(self.record)
        kinds = {"status", "slow"}
        if self.record.range:
            kinds |= {"wrong_range", "ignore_range"}
        if self.upload:
            kinds.add("cut")
        self._meet(self.controls.take(kinds, self.method, self.path, self.upload))
        if self._plays("slow"):
            await asyncio.sleep(self._fault.delay)
        if self._plays("status"):
            await self._refuse()
            return
        if self._plays("ignore_range"):
            self.scope["headers"] = [item for item in self.scope["headers"] if item[0] != b"range"]
        await app(self.scope, self.receive, self.send)

    def _meet(self, fault: Fault | None) -> None:
        if fault is not None:
            self.fault = fault
            self.record.fault = fault.kind

    def _plays(self, kind: str) -> bool:
        return self.fault is not None and self.fault.kind == kind

    @property
    def _fault(self) -> Fault:
        assert self.fault is not None
        return self.fault

    async def _refuse(self) -> None:
        # An answer before the end of an upload would reach some clients as a broken pipe.
        while self.upload and (message := await self.receive())["type"] == "http.request" and message.get("more_body"):
            pass
        body = json.dumps({"error": f"The local Hub was told to answer {self._fault.status}"}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if self._fault.retry_after is not None:
            headers.append((b"retry-after", f"{self._fault.retry_after:g}".encode()))
        await self.send({"type": "http.response.start", "status": self._fault.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def receive(self) -> Message:
        message = await self.inner_receive()
        size = len(message.get("body", b""))
        self.record.bytes_received += size
        if self._plays("cut") and self.record.bytes_received > self._fault.at:
            await self._hang_up()
            return {"type": "http.disconnect"}
        if size and self._plays("slow") and self._fault.bytes_per_second:
            await asyncio.sleep(size / self._fault.bytes_per_second)
        return message

    async def send(self, message: Message) -> None:
        if self.scope["transport"].is_closing():
            return
        if message["type"] == "http.response.start":
            self._start(message)
            await self.inner_send(message)
            return
        body: bytes = message.get("body", b"")
        if self.method == "HEAD":
            await self.inner_send(message)
        elif self._plays("cut"):
            await self._send_until_cut(message, body)
        elif self._plays("corrupt"):
            position = self._fault.at - self.record.bytes_served
            if 0 <= position < len(body):
                body = body[:position] + bytes([body[position] ^ 0xFF]) + body[position + 1 :]
            await self._send({**message, "body": body}, body)
        elif self._plays("slow") and self._fault.bytes_per_second:
            await self._send_slowly(message, body, self._fault.bytes_per_second)
        else:
            await self._send(message, body)

    def _start(self, message: Message) -> None:
        self.record.status = message["status"]
        headers: list[tuple[bytes, bytes]] = list(message.get("headers", []))
        if self.fault is None and self.method == "GET":
            length = int(dict(headers).get(b"content-length", b"0"))
            self._meet(self.controls.take({"cut", "corrupt"}, self.method, self.path, length))
        if self._plays("wrong_range"):
            message["headers"] = [(name, _shifted(value) if name == b"content-range" else value) for name, value in headers]

    async def _send(self, message: Message, body: bytes) -> None:
        # Counted first: the client may look at the record as soon as it has the bytes.
        self.record.bytes_served += len(body)
        await self.inner_send(message)

    async def _send_until_cut(self, message: Message, body: bytes) -> None:
        room = self._fault.at - self.record.bytes_served
        if len(body) <= room:
            await self._send(message, body)
            return
        await self._send({**message, "body": body[:room], "more_body": True}, body[:room])
        await self._hang_up()

    async def _send_slowly(self, message: Message, body: bytes, rate: float) -> None:
        step = max(1, int(rate / 20))
        for start in range(0, max(1, len(body)), step):
            if self.scope["transport"].is_closing():
                return
            piece = body[start : start + step]
            more = bool(message.get("more_body")) or start + step < len(body)
            await self._send({**message, "body": piece, "more_body": more}, piece)
            await asyncio.sleep(len(piece) / rate)

    async def _hang_up(self) -> None:
        self.scope["transport"].close()
        while (await self.inner_receive())["type"] != "http.disconnect":
            pass


def _shifted(content_range: bytes) -> bytes:
    first, _, rest = content_range.removeprefix(b"bytes ").partition(b"-")
    last, _, size = rest.partition(b"/")
    return b"bytes %d-%d/%s" % (int(first) + 1, int(last) + 1, size) if first.isdigit() else content_range


def as_fault(data: dict[str, Any]) -> Fault:
    """A fault from JSON; raises ValueError for unknown fields or values."""
    try:
        return Fault(**data)
    except TypeError as error:
        raise ValueError(str(error)) from None
