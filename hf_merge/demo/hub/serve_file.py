"""File contents over HTTP: ranges, conditional lengths, bounded memory."""

import re
from pathlib import Path

from anyio.to_thread import run_sync
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hf_merge.demo.hub.objects import CHUNK

_RANGE = re.compile(r"bytes=(\d*)-(\d*)", re.IGNORECASE)
_INLINE = 1 << 17


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and length of a `Range`; None for the whole file (also if the header is malformed or lists several).

    Raises ValueError if the range lies outside the file.
    """
    match = _RANGE.fullmatch((header or "").replace(" ", ""))
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        length = min(int(last), size)
        if length == 0:
            raise ValueError(header)
        return size - length, length
    if last and int(last) < int(first):
        return None
    if int(first) >= size:
        raise ValueError(header)
    return int(first), min(int(last) if last else size - 1, size - 1) - int(first) + 1


class FileContent(Response):
    """A file, or the range of it that `range_header` names, read from disk in chunks while it is sent."""

    def __init__(self, path: Path, size: int, headers: dict[str, str], range_header: str | None) -> None:
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        self.path = path
        self.first, self.length, status = 0, size, 200
        try:
            part = byte_range(range_header, size)
        except ValueError:
            self.length, status = 0, 416
            headers["Content-Range"] = f"bytes */{size}"
        else:
            if part is not None:
                self.first, self.length = part
                status = 206
                headers["Content-Range"] = f"bytes {self.first}-{self.first + self.length - 1}/{size}"
        headers["Content-Length"] = str(self.length)
        super().__init__(None, status, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the headers, and the content unless this is a HEAD."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if scope["method"] == "HEAD" or not self.length:
            await send({"type": "http.response.body", "body": b""})
            return
        left = self.length
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.first)
            while left and not scope["transport"].is_closing():
                count = min(CHUNK, left)
                # A hop to a thread costs more than reading a small range that is likely in the page cache.
                chunk = file.read(count) if count <= _INLINE else await run_sync(file.read, count)
                if not chunk:
                    raise OSError(f"{self.path} is shorter than it was")
                left -= len(chunk)
                await send({"type": "http.response.body", "body": chunk, "more_body": left > 0})
