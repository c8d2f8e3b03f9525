"""transformers, peft, datasets, evaluate and cards against a local Hub, unchanged."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_merge.demo.hub.server import LocalHub

PARITY = """
import datasets
import evaluate


class Parity(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"parity": sum(a == b for a, b in zip(predictions, references)) / len(references)}
"""


@pytest.fixture(scope="module")
def library_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        hub.seed("evaluate-metric/parity", {"parity.py": PARITY}, repo_type="space")
        yield hub


def run_script(hub: LocalHub, folder: Path, script: str, *arguments: str) -> None:
    environment = {
        **os.environ,
        **hub.environment(),
        "HF_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    hub.clear_requests()
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert not [request for request in hub.requests() if request.status >= 500]


@pytest.mark.parametrize("library", ["transformers", "peft", "load_dataset", "load_metric"])
def test_a_library_pushes_and_loads(library_hub: LocalHub, tmp_path: Path, library: str) -> None:
    run_script(library_hub, tmp_path, "library_round_trips.py", library)


def test_a_card_is_pushed_changed_and_found(library_hub: LocalHub, tmp_path: Path) -> None:
    run_script(library_hub, tmp_path, "card_round_trip.py")
