"""Local Hubs and clients for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, constants

from hf_merge.demo.hub.server import LocalHub


@pytest.fixture(autouse=True)
def _plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def api(hub: LocalHub) -> HfApi:
    """The user demo."""
    return HfApi(endpoint=hub.endpoint, token="hf_local")


@pytest.fixture
def guest(hub: LocalHub) -> HfApi:
    """The user guest, who owns nothing of demo."""
    return HfApi(endpoint=hub.endpoint, token="hf_guest")


@pytest.fixture
def anonymous(hub: LocalHub) -> HfApi:
    """No token at all."""
    return HfApi(endpoint=hub.endpoint, token=False)


@pytest.fixture
def http(hub: LocalHub) -> Iterator[httpx2.Client]:
    """A client that does not interpret anything."""
    with httpx2.Client(base_url=hub.endpoint, timeout=20) as client:
        yield client
