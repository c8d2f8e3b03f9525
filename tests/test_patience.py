"""Asking again: only for what may pass, no more often than said, as late as a server asks."""

from types import SimpleNamespace

import httpx2 as httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from hf_merge import patience
from hf_merge.patience import LONGEST_WAIT, RETRIED, TRIES, patiently

REQUEST = httpx.Request("GET", "http://127.0.0.1/")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited; nobody waits."""
    found: list[float] = []
    monkeypatch.setattr(patience, "time", SimpleNamespace(sleep=found.append))
    return found


class Fails:
    """A call that fails `times` times with `error`, and then gives the number of calls."""

    def __init__(self, error: Exception, times: int = 1000) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return self.calls


def answer(status: int, **headers: str) -> HfHubHTTPError:
    return HfHubHTTPError("said", response=httpx.Response(status, headers=headers, request=REQUEST))


def wrapped(error: Exception) -> Exception:
    outer = RuntimeError("Error while uploading")
    outer.__cause__ = error
    return outer


PASSING = [answer(status) for status in sorted(RETRIED)] + [httpx.ReadTimeout("slow"), httpx.ReadError("cut")]
LASTING = [answer(403), answer(404), httpx.LocalProtocolError("bad header"), ValueError("no"), httpx.ConnectError("refused")]


@pytest.mark.parametrize("error", [*PASSING, *map(wrapped, PASSING)], ids=repr)
def test_what_may_pass_is_asked_again(error: Exception, waits: list[float]) -> None:
    assert patiently(Fails(error, TRIES - 1)) == TRIES
    assert len(waits) == TRIES - 1


@pytest.mark.parametrize("error", [*LASTING, *map(wrapped, LASTING)], ids=repr)
def test_what_lasts_is_not(error: Exception, waits: list[float]) -> None:
    call = Fails(error)
    with pytest.raises(type(error)) as caught:
        patiently(call)
    assert caught.value is error
    assert (call.calls, waits) == (1, [])


def test_the_last_error_is_told_when_it_does_not_pass(waits: list[float]) -> None:
    call = Fails(answer(503))
    with pytest.raises(HfHubHTTPError):
        patiently(call)
    assert call.calls == TRIES
    assert waits == sorted(waits)


def test_a_server_that_was_there_may_be_away_for_a_while(waits: list[float]) -> None:
    assert patiently(Fails(httpx.ConnectError("refused"), 2), reached=True) == 3


@pytest.mark.parametrize(("asked", "waited"), [("0", 0), ("3", 3), ("3600", LONGEST_WAIT)])
def test_a_server_says_how_long_to_wait(asked: str, waited: float, waits: list[float]) -> None:
    patiently(Fails(answer(429, **{"Retry-After": asked}), 1))
    assert waits == [waited]
