"""A server that misbehaves: what may pass, how long to wait for it, and how often to ask again."""

import random
import time
from collections.abc import Callable
from itertools import count
from typing import TypeVar

import httpx2 as httpx
from huggingface_hub.errors import HfHubHTTPError

TRIES = 6
LONGEST_WAIT = 30.0
"""Seconds between two tries at most, a server's Retry-After included."""
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
BROKEN = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
"""Failures on the way. Others, such as a header that cannot be sent, would be the same again."""

T = TypeVar("T")


def patiently(call: Callable[[], T], *, reached: bool = False) -> T:
    """What `call` returns, after up to `TRIES` tries while it fails in ways that may pass; else its last error.

    `reached` says that the server was there before, so that a refused connection may pass too.
    """
    for failed in count(1):
        try:
            return call()
        except Exception as error:
            reason = _reason(error)
            if failed == TRIES or reason is None or (isinstance(reason, httpx.ConnectError) and not reached):
                raise
            wait(failed, retry_after(reason.response) if isinstance(reason, HfHubHTTPError) else None)
    raise AssertionError("counting ends never")


def wait(failed: int, asked: float | None) -> None:
    """Sleep before the next try: as long as the server asks for, or else about twice as long after each failure."""
    time.sleep(min(LONGEST_WAIT, asked if asked is not None else random.uniform(0.5, 1.0) * 2 ** (failed - 2)))


def retry_after(response: httpx.Response) -> float | None:
    """The seconds that an answer asks to wait; None if it does not, or names a date."""
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None


def _reason(error: BaseException | None) -> Exception | None:
    """What may pass among an error and its causes: clients wrap what a storage answered."""
    while error is not None:
        if isinstance(error, BROKEN) or (isinstance(error, HfHubHTTPError) and error.response.status_code in RETRIED):
            return error
        error = error.__cause__
    return None
