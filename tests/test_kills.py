"""Merges that are killed again and again, at any moment: the same bytes in the end, and little done twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from tiny_models import Maker

from hf_merge.demo.hub.server import LocalHub
from hf_merge.recipes import yaml
from hf_merge.recipes.recipe import Recipe
from hf_merge.single import merge

pytestmark = pytest.mark.slow

KILLS = 10
SHARD = 30_000
AHEAD = 40_000
"""Bytes that are read ahead: by default that would be all of a tiny model."""

MERGES = """
import os, sys, time, traceback
from pathlib import Path
from hf_merge.merging import execute
from hf_merge.single import merge

recipe, where, place, ahead, size, pause = sys.argv[1:]
assert execute.IN_FLIGHT
execute.IN_FLIGHT = int(ahead)

begun = []

def dawdle(event, given):
    if event == "open" and str(given[0]).endswith("safetensors.part"):
        if not begun:
            begun.append(print("merging", flush=True))
        time.sleep(float(pause))

sys.addaudithook(dawdle)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        try:
            merge(Path(recipe), **{where: place}, max_shard_size=int(size), progress=False)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""For each line a process that merges: its id, "merging" with its first shard, its exit code. It need not import anything."""


@pytest.fixture
def recipe(make: Maker) -> Recipe:
    """Three models of some twenty shards each."""
    base, *models = map(str, make("llama", 3, num_hidden_layers=20))
    return Recipe(method="task_arithmetic", base=base, models=tuple(models), parameters={"scaling": 0.5})


def killed_again_and_again(recipe: Recipe, where: str, place: str, folder: Path, pause: float) -> None:
    """Merge in processes that are killed at random moments, and then in one that is left alone."""
    (folder / "recipe.yaml").write_text(yaml.dumps(recipe))
    command = [sys.executable, "-c", MERGES, folder / "recipe.yaml", where, place, str(AHEAD), str(SHARD), str(pause)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_MERGE_CACHE": str(folder / "cache")}
    random = Random(7)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as merges:
        assert merges.stdin is not None
        assert merges.stdout is not None
        for moment in [*(random.uniform(0, 0.8) for _ in range(KILLS)), None]:
            print(file=merges.stdin, flush=True)
            process = int(merges.stdout.readline())
            assert merges.stdout.readline() == "merging\n"
            if moment is not None:
                time.sleep(moment)
                os.kill(process, signal.SIGKILL)
            assert int(merges.stdout.readline()) == (0 if moment is None else -signal.SIGKILL)


def tensor_bytes(hub: LocalHub) -> int:
    """Bytes of tensors that the Hub has served; each run reads the headers again, that is why those do not count."""
    served = [r for r in hub.requests() if r.method == "GET" and r.path.endswith(".safetensors")]
    return sum(request.bytes_served for request in served if not (request.range or "").startswith("bytes=0-"))


def published(repo_id: str) -> dict[str, str]:
    """File to content hash; the card names its repository."""
    tree = HfApi().list_repo_tree(repo_id)
    return {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in tree if isinstance(f, RepoFile) and f.path != "README.md"}


def test_a_push_that_is_killed_ten_times_arrives_and_fetches_two_shards_a_kill_anew_at_most(
    recipe: Recipe, hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in recipe.inputs:
        hub.seed(f"kills/{model.path.name}", model.path)
    names = [f"kills/{model.path.name}" for model in recipe.inputs]
    streamed = Recipe(method=recipe.method, base=names[0], models=tuple(names[1:]), parameters={"scaling": 0.5})
    monkeypatch.setenv("HF_MERGE_CACHE", str(tmp_path / "undisturbed"))
    hub.clear_requests()
    plan = merge(streamed, push_to="demo/undisturbed", max_shard_size=SHARD, progress=False).plan
    assert len(plan.shards) > 2 * KILLS
    once = tensor_bytes(hub)
    hub.clear_requests()
    hub.fault("slow", "/_lfs/*", method="PUT", times=None, delay=0.3)
    killed_again_and_again(streamed, "push_to", "demo/killed", tmp_path, pause=0.3)
    again = tensor_bytes(hub) - once
    uploads = [r.path for r in hub.requests() if r.method == "PUT" and r.status == 200]
    assert published("demo/killed") == published("demo/undisturbed")
    assert len(HfApi().list_repo_commits("demo/killed")) == len(HfApi().list_repo_commits("demo/undisturbed"))
    worth = len(plan.inputs) * max(shard.nbytes for shard in plan.shards)
    assert again <= KILLS * (2 * worth + AHEAD)
    assert len(uploads) <= len(plan.shards) + KILLS
    assert list((tmp_path / "cache/pushes").iterdir()) == []


def test_a_merge_into_a_folder_that_is_killed_ten_times_has_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    merge(recipe, tmp_path / "undisturbed/out", max_shard_size=SHARD, progress=False)
    killed_again_and_again(recipe, "out", str(tmp_path / "killed/out"), tmp_path, pause=0.5)
    assert contents(tmp_path / "killed/out") == contents(tmp_path / "undisturbed/out")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
