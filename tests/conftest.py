"""One local Hub for the whole run, its address set before any Hub client is imported; tiny models; the specialists."""

import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from hf_merge.demo.hub.server import LocalHub

_SCRATCH = tempfile.TemporaryDirectory(prefix="hf_merge-tests-")
_HUB = LocalHub(Path(_SCRATCH.name) / "hub").start()
os.environ.update(
    _HUB.environment()
    | {
        "HF_HOME": str(Path(_SCRATCH.name) / "hf_home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
)

# Only now: these read the environment when they are imported.
import torch  # noqa: E402
from tiny_models import Maker, make_models  # noqa: E402

from hf_merge.demo.classifiers import CLASSIFIERS  # noqa: E402
from hf_merge.demo.specialists import FamilyFolder, build_family  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    """The Hub of the environment, well-behaved and with an empty log at the start of each test."""
    _HUB.clear_faults()
    _HUB.clear_requests()
    yield _HUB
    _HUB.clear_faults()


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """`tiny_models.make_models` below the test's own folder."""
    return partial(make_models, tmp_path)


@pytest.fixture(scope="session")
def specialists() -> FamilyFolder:
    """The real demo family; built by the first test that asks (about a minute), then kept in the cache."""
    return build_family(CLASSIFIERS, progress=False)
