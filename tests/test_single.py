"""One merge of one recipe: into a folder or a repository, refused in time, resumed after any end, by one process or two."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from tiny_models import Maker
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_merge import single
from hf_merge.demo.hub.server import LocalHub
from hf_merge.errors import CheckpointError, MergeError, PublishError, RecipeError
from hf_merge.merging.merger import Merger
from hf_merge.merging.plan import MergePlan
from hf_merge.recipes import yaml
from hf_merge.recipes.recipe import Recipe
from hf_merge.single import MARKER, Merged, check, merge

SHARD = "*.safetensors"
SMALL = 20_000
"""Shards of this size make several of a tiny model."""


def recipe_of(folders: list, scaling: float = 0.5) -> Recipe:
    base, *models = map(str, folders)
    return Recipe(method="task_arithmetic", base=base, models=tuple(models), parameters={"scaling": scaling})


def seed(hub: LocalHub, folders: list[Path], namespace: str) -> list[str]:
    """The models on the Hub, and a clean log."""
    for folder in folders:
        hub.seed(f"{namespace}/{folder.name}", folder)
    hub.clear_requests()
    return [f"{namespace}/{folder.name}" for folder in folders]


def quietly(recipe: Recipe | Path, out: Path | None = None, **more: object) -> Merged:
    return merge(recipe, out, progress=False, **{"max_shard_size": SMALL} | more)  # type: ignore[arg-type]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(SHARD))}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob(SHARD))}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def is_loadable(folder: Path) -> bool:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError):
        return False
    return True


# Where it goes


@pytest.mark.parametrize("where", [{}, {"out": "folder", "push_to": "demo/both"}])
def test_a_merge_goes_to_one_place(where: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="either `out`, a folder, or `push_to`"):
        merge("nowhere.yaml", **where)  # type: ignore[arg-type]


def test_a_merge_says_where_it_went_and_what_was_done(make: Maker, tmp_path: Path) -> None:
    folders = make("llama", 2)
    done = quietly(recipe_of(folders), tmp_path / "deep/er/out")
    assert done.where == str(tmp_path / "deep/er/out")
    assert 0 < done.seconds < 60
    assert done.plan.bytes_written == sum(map(len, shards(tmp_path / "deep/er/out").values()))
    assert is_loadable(tmp_path / "deep/er/out")


@pytest.mark.parametrize("given", [".", "../here", "./", "~/here"])
def test_a_card_is_titled_by_the_name_of_the_folder(
    given: str, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = make("llama", 2)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    quietly(recipe_of(folders), given)  # type: ignore[arg-type]
    assert "model_name: here\n" in (tmp_path / "here/README.md").read_text()


def test_a_folder_that_is_there_and_empty_is_taken(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    quietly(recipe_of(make("llama", 2)), tmp_path / "out")
    assert is_loadable(tmp_path / "out")


def test_a_folder_that_holds_anything_is_refused_and_left_alone(make: Maker, hub: LocalHub, tmp_path: Path) -> None:
    recipe = recipe_of(seed(hub, make("llama", 2), "full"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.safetensors").write_bytes(b"precious")
    with pytest.raises(MergeError, match=r"out is not empty.*overwrite"):
        quietly(recipe, tmp_path / "out")
    assert files(tmp_path / "out") == {"model.safetensors"}
    assert (tmp_path / "out/model.safetensors").read_bytes() == b"precious"
    assert hub.bytes_served(SHARD) <= 2 * 100_000


def test_overwriting_leaves_nothing_of_an_earlier_merge_s_weights(make: Maker, tmp_path: Path) -> None:
    folders = make("llama", 2)
    quietly(recipe_of(folders, 0.1), tmp_path / "out")
    assert len(shards(tmp_path / "out")) > 1
    quietly(recipe_of(folders), tmp_path / "out", max_shard_size="5GB", overwrite=True)
    quietly(recipe_of(folders), tmp_path / "fresh", max_shard_size="5GB")
    assert shards(tmp_path / "out") == shards(tmp_path / "fresh")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_a_folder_is_not_marked_before_it_is_swept(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "out/cannot-be-removed.safetensors").mkdir(parents=True)
    with pytest.raises(MergeError, match="out cannot be written"):
        quietly(recipe_of(make("llama", 2)), tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == {"cannot-be-removed.safetensors"}


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("way", ["{}", "{}/../{name}", "{link}"])
def test_a_model_is_never_overwritten_by_its_own_merge(position: int, way: str, make: Maker, tmp_path: Path) -> None:
    folders = make("llama", 2)
    model = folders[position]
    (tmp_path / "link").symlink_to(model)
    before = shards(model)
    with pytest.raises(MergeError, match="is one of the models that are merged"):
        quietly(recipe_of(folders), Path(way.format(model, name=model.name, link=tmp_path / "link")), overwrite=True)
    assert shards(model) == before
    assert MARKER not in files(model)


@pytest.mark.parametrize("below", ["file", "file/out", "file/deep/out"])
def test_a_place_that_cannot_be_written_is_an_error_before_any_tensor_is_read(
    below: str, make: Maker, hub: LocalHub, tmp_path: Path
) -> None:
    recipe = recipe_of(seed(hub, make("llama", 2), "place"))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(MergeError, match=rf"{below} cannot be written"):
        quietly(recipe, tmp_path / below)
    assert hub.bytes_served(SHARD) <= 2 * 100_000


@pytest.mark.parametrize("size", ["many", "5 potatoes", "", "GB"])
def test_a_shard_size_that_is_none_is_refused(size: str, make: Maker, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"max_shard_size.*5GB"):
        quietly(recipe_of(make("llama", 2)), tmp_path / "out", max_shard_size=size)


# Room on the disk


@contextmanager
def free(monkeypatch: pytest.MonkeyPatch, room: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=room))
        yield


def test_a_disk_that_is_too_full_is_an_error_before_any_tensor_is_read(
    make: Maker, hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(seed(hub, make("llama", 2), "room"))
    needed = check(recipe).bytes_written
    with free(monkeypatch, 1000), pytest.raises(MergeError, match=r"needs [\d,]+ bytes, and .*out has 1,000 left"):
        quietly(recipe, tmp_path / "out", max_shard_size="5GB")
    assert hub.bytes_served(SHARD) <= 4 * 100_000
    with free(monkeypatch, needed):
        quietly(recipe, tmp_path / "out", max_shard_size="5GB")
    assert is_loadable(tmp_path / "out")


def test_overwriting_counts_the_room_that_it_frees_and_spares_the_old_model_if_that_is_not_enough(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, bigger = make("llama", 2), make("llama", 2, parent="bigger", vocab_size=1000)
    quietly(recipe_of(folders), tmp_path / "out")
    old = shards(tmp_path / "out")
    with free(monkeypatch, 1000), pytest.raises(MergeError, match="needs"):
        quietly(recipe_of(bigger), tmp_path / "out", overwrite=True)
    assert shards(tmp_path / "out") == old
    assert is_loadable(tmp_path / "out")
    with free(monkeypatch, 1000):
        quietly(replace(recipe_of(folders), dtype="bfloat16"), tmp_path / "out", overwrite=True)
    assert is_loadable(tmp_path / "out")


def test_a_disk_that_fills_up_while_writing_is_an_error_that_names_the_place(make: Maker, tmp_path: Path) -> None:
    recipe = recipe_of(make("llama", 2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(MergeError, match=r"out cannot be written: .*(too large|space)"):
            quietly(recipe, tmp_path / "out", max_shard_size="5GB")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path / "out") == {MARKER}


# Cut off, and done again


def cut_off(recipe: Recipe, out: Path, hub: LocalHub, after: int = 20) -> None:
    """A merge from the Hub that ends at a refusal in its middle."""
    hub.fault("status", SHARD, status=404, skip=len(recipe.inputs) + after, times=None)
    with pytest.raises(CheckpointError, match="cannot be read"):
        quietly(recipe, out)
    hub.clear_faults()
    assert 0 < len(shards(out)) < len(check(recipe).shards) + 5


def test_a_merge_that_was_cut_off_leaves_nothing_to_load_and_goes_on(make: Maker, hub: LocalHub, tmp_path: Path) -> None:
    recipe = recipe_of(seed(hub, make("llama", 3), "goes-on"))
    quietly(recipe, tmp_path / "whole")
    cut_off(recipe, tmp_path / "out", hub)
    assert not is_loadable(tmp_path / "out")
    assert files(tmp_path / "out") == {MARKER, *shards(tmp_path / "out")}
    before = times(tmp_path / "out")
    hub.clear_requests()
    done = quietly(recipe, tmp_path / "out")
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert before == {name: changed for name, changed in times(tmp_path / "out").items() if name in before}
    tensors = [r.bytes_served for r in hub.requests() if r.path.endswith(".safetensors") and r.range and "=0-" not in r.range]
    assert 0 < sum(tensors) < done.plan.bytes_read
    assert is_loadable(tmp_path / "out")


def test_going_on_needs_room_for_what_is_missing_only(
    make: Maker, hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(seed(hub, make("llama", 3), "room-left"))
    cut_off(recipe, tmp_path / "out", hub)
    missing = quietly(recipe, tmp_path / "whole").plan.bytes_written - sum(map(len, shards(tmp_path / "out").values()))
    with free(monkeypatch, missing - 1), pytest.raises(MergeError, match=f"needs {missing:,} bytes"):
        quietly(recipe, tmp_path / "out")
    with free(monkeypatch, missing):
        quietly(recipe, tmp_path / "out")
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


@pytest.mark.parametrize("change", ["recipe", "shard size", "marker", "marker is empty"])
def test_what_another_merge_left_is_not_taken(change: str, make: Maker, hub: LocalHub, tmp_path: Path) -> None:
    ids = seed(hub, make("llama", 3), "other-merge")
    cut_off(recipe_of(ids, 0.1 if change == "recipe" else 0.5), tmp_path / "out", hub)
    for path in (tmp_path / "out").glob(SHARD):
        path.write_bytes(path.read_bytes()[:-4] + b"gone")
    if change.startswith("marker"):
        (tmp_path / "out" / MARKER).write_text("" if change == "marker is empty" else "{}")
    size = SMALL + 5000 if change == "shard size" else SMALL
    quietly(recipe_of(ids), tmp_path / "out", max_shard_size=size)
    quietly(recipe_of(ids), tmp_path / "fresh", max_shard_size=size)
    assert shards(tmp_path / "out") == shards(tmp_path / "fresh")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_a_local_model_that_changed_in_between_is_merged_anew(make: Maker, tmp_path: Path) -> None:
    folders = make("llama", 2)
    last = "model.norm.weight"
    good = load_file(folders[1] / "model.safetensors")
    save_file(good | {last: torch.full((32,), torch.nan)}, folders[1] / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match=last):
        quietly(recipe_of(folders), tmp_path / "out")
    assert shards(tmp_path / "out")
    save_file({name: -tensor for name, tensor in good.items()}, folders[1] / "model.safetensors", {"format": "pt"})
    quietly(recipe_of(folders), tmp_path / "out")
    quietly(recipe_of(folders), tmp_path / "fresh")
    assert shards(tmp_path / "out") == shards(tmp_path / "fresh")


def test_what_a_killed_process_was_writing_is_swept_away(make: Maker, tmp_path: Path) -> None:
    recipe = recipe_of(make("llama", 2))
    quietly(recipe, tmp_path / "fresh")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_text("{}")
    (tmp_path / "out" / ".model-00077-of-00099.safetensors.part").write_bytes(bytes(100))
    quietly(recipe, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_process_that_ends_in_the_middle_keeps_what_is_whole_and_the_same_command_goes_on(
    sent: signal.Signals, code: int, make: Maker, hub: LocalHub, tmp_path: Path
) -> None:
    recipe = recipe_of(seed(hub, make("llama", 3), "killed"))
    (tmp_path / "recipe.yaml").write_text(yaml.dumps(recipe))
    quietly(recipe, tmp_path / "whole")
    hub.fault("slow", SHARD, times=None, skip=3, delay=0.15)
    command = [sys.executable, "-m", "hf_merge.cli", "merge", tmp_path / "recipe.yaml", tmp_path / "out"]
    command += ["--max-shard-size", str(SMALL), "--quiet"]
    # A shell starts what it runs in the background with SIGINT ignored, and that would be inherited.
    attend = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=attend)
    deadline = time.monotonic() + 60
    while len(shards(tmp_path / "out")) < 2:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(sent)
    _, said = process.communicate(timeout=10)
    hub.clear_faults()
    assert process.returncode == code
    assert said == ("" if sent == signal.SIGKILL else "Interrupted. What was finished is kept; the same command goes on.\n")
    before = times(tmp_path / "out")
    assert 2 <= len(before) < len(shards(tmp_path / "whole"))
    assert not is_loadable(tmp_path / "out")
    quietly(tmp_path / "recipe.yaml", tmp_path / "out")
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert before == {name: changed for name, changed in times(tmp_path / "out").items() if name in before}


# Straight to the Hub


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where shards on their way to the Hub lie, and what is noted of them."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("HF_MERGE_CACHE", str(tmp_path / "scratch"))
    return tmp_path / "scratch/pushes"


def test_a_push_is_one_commit_and_holds_what_a_folder_would(make: Maker, hub: LocalHub, tmp_path: Path, scratch: Path) -> None:
    folders = make("llama", 3)
    quietly(recipe_of(folders), tmp_path / "local")
    repo_id = "demo/pushed"
    done = quietly(recipe_of(folders), push_to=repo_id)
    assert repo_id in done.where
    api = HfApi()
    assert sum("Task arithmetic" in commit.title for commit in api.list_repo_commits(repo_id)) == 1
    assert len(api.list_repo_commits(repo_id)) <= 2
    assert set(api.list_repo_files(repo_id)) - {".gitattributes"} == files(tmp_path / "local")
    pushed, local = (AutoModelForCausalLM.from_pretrained(where) for where in (repo_id, tmp_path / "local"))
    assert all(torch.equal(local.state_dict()[name], tensor) for name, tensor in pushed.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(repo_id)) == 96
    assert list(scratch.iterdir()) == []


def test_a_push_holds_two_shards_on_disk_at_most(make: Maker, hub: LocalHub, scratch: Path) -> None:
    folders = make("llama", 2)
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, sum(path.suffix in (".safetensors", ".part") for path in scratch.rglob("*/scratch-*/*")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        hub.fault("slow", "/_lfs/*", method="PUT", times=None, delay=0.02)
        plan = quietly(recipe_of(folders), push_to="demo/streamed").plan
    finally:
        done.set()
        watcher.join()
    assert len(plan.shards) > 3
    assert most == 2


def test_a_push_that_fails_in_the_middle_shows_nothing_and_leaves_nothing(make: Maker, hub: LocalHub, scratch: Path) -> None:
    folders = make("llama", 2)
    hub.fault("status", "/_lfs/*", method="PUT", status=403, skip=2, times=None)
    with pytest.raises(PublishError, match=r"demo/half"):
        quietly(recipe_of(folders), push_to="demo/half")
    assert not [path for path in scratch.rglob("*") if path.name.endswith((".safetensors", ".part"))]
    assert not [name for name in HfApi().list_repo_files("demo/half") if name.endswith((".safetensors", ".json"))]
    hub.clear_faults()
    sent = sum(request.method == "PUT" and request.status == 200 for request in hub.requests())
    done = quietly(recipe_of(folders), push_to="demo/half")
    AutoModelForCausalLM.from_pretrained("demo/half")
    assert sent == 2
    assert sum(r.method == "PUT" and r.status == 200 for r in hub.requests()) == len(done.plan.shards)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("repo_id", ["somebody/else", "not a name", "guest/theirs"])
def test_a_repository_that_may_not_be_written_is_refused_before_anything_is_read(
    repo_id: str, make: Maker, hub: LocalHub
) -> None:
    recipe = recipe_of(seed(hub, make("llama", 2), "refused"))
    hub.seed("guest/theirs", {"README.md": "x"})
    with pytest.raises(PublishError):
        quietly(recipe, push_to=repo_id)
    assert hub.bytes_served(SHARD) == 0


# Several processes

TWO = """
import sys
from pathlib import Path
from accelerate import PartialState
from hf_merge.single import merge

opened = []

def notice(event, given):
    if event == "open" and str(given[0]).endswith(".part"):
        opened.append(Path(given[0]).name[1:-5])

sys.addaudithook(notice)
state = PartialState(cpu=True)
assert state.num_processes == 2
merge(Path(sys.argv[1]), sys.argv[2], max_shard_size=int(sys.argv[3]), progress=False)
assert (Path(sys.argv[2]) / "config.json").is_file()
Path(sys.argv[1]).with_name(f"opened-{state.process_index}").write_text(" ".join(opened))
state.destroy_process_group()
"""


def test_two_processes_write_the_bytes_of_one_and_each_shard_once(make: Maker, tmp_path: Path) -> None:
    recipe = recipe_of(make("llama", 3))
    (tmp_path / "recipe.yaml").write_text(yaml.dumps(recipe))
    (tmp_path / "two.py").write_text(TWO)
    one = quietly(recipe, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [tmp_path / "two.py", tmp_path / "recipe.yaml", tmp_path / "two", str(SMALL)]
    packages = str(Path(__file__).parents[1])
    subprocess.run([*torchrun, *arguments], check=True, env=os.environ | {"PYTHONPATH": packages}, timeout=100)
    first, second = ((tmp_path / f"opened-{i}").read_text().split() for i in range(2))
    assert sorted(first + second) == sorted(shard.name for shard in one.plan.shards)
    assert abs(len(first) - len(second)) <= 1
    assert shards(tmp_path / "two") == shards(tmp_path / "one")
    assert files(tmp_path / "two") == files(tmp_path / "one")


TWO_PUSH = """
import sys
from pathlib import Path
from accelerate import PartialState
from hf_merge.single import merge

state = PartialState(cpu=True)
assert state.num_processes == 2
done = merge(Path(sys.argv[1]), push_to=sys.argv[2], max_shard_size=int(sys.argv[3]), progress=False)
assert "/commit/" in done.where, done.where
state.destroy_process_group()
"""


def test_two_processes_push_the_bytes_of_one_in_one_commit(make: Maker, hub: LocalHub, tmp_path: Path, scratch: Path) -> None:
    recipe = recipe_of(make("llama", 3))
    (tmp_path / "recipe.yaml").write_text(yaml.dumps(recipe))
    (tmp_path / "two.py").write_text(TWO_PUSH)
    quietly(recipe, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [tmp_path / "two.py", tmp_path / "recipe.yaml", "demo/two", str(SMALL)]
    packages = str(Path(__file__).parents[1])
    subprocess.run([*torchrun, *arguments], check=True, env=os.environ | {"PYTHONPATH": packages}, timeout=100)
    assert sum("Task arithmetic" in commit.title for commit in HfApi().list_repo_commits("demo/two")) == 1
    sent = [request.path for request in hub.requests() if request.method == "PUT" and request.path.startswith("/_lfs/")]
    assert len(sent) == len(set(sent)) == len(shards(tmp_path / "one"))
    pushed = Path(HfApi().snapshot_download("demo/two"))
    assert shards(pushed) == shards(tmp_path / "one")
    assert list(scratch.iterdir()) == []


def test_consent_is_asked_for_publishing_and_not_for_a_folder_of_one_s_own(make: Maker, hub: LocalHub, tmp_path: Path) -> None:
    folders = make("llama", 3)
    (folders[1] / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    recipe = recipe_of(folders)
    with pytest.raises(PublishError, match=r"cc-by-nc-4\.0"):
        quietly(recipe, push_to="demo/restricted")
    assert not HfApi().repo_exists("demo/restricted")
    quietly(recipe, tmp_path / "own")
    assert "cc-by-nc-4.0" in (tmp_path / "own" / "README.md").read_text()
    quietly(recipe, push_to="demo/restricted", consent=True)


def test_a_push_that_has_no_room_for_two_shards_is_refused_before_any_tensor_is_read(
    make: Maker, hub: LocalHub, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(seed(hub, make("llama", 2), "crowded"))
    sizes = sorted(shard.nbytes for shard in quietly(recipe, push_to="demo/roomy").plan.shards)
    hub.clear_requests()
    with free(monkeypatch, sum(sizes[-2:]) - 1), pytest.raises(MergeError, match=r"2 shards at a time need .*max_shard_size"):
        quietly(recipe, push_to="demo/crowded")
    assert hub.bytes_served(SHARD) <= 4 * 100_000
    with free(monkeypatch, sum(sizes[-2:])):
        quietly(recipe, push_to="demo/crowded")


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_memory_that_runs_out_is_not_blamed_on_the_disk(
    error: Exception, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(Merger, "merge", run_out)
    with pytest.raises(MergeError, match=r"Memory ran out: .*max_memory"):
        quietly(recipe_of(make("llama", 2)), tmp_path / "out")


def test_a_result_that_another_process_wrote_into_is_not_called_done(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = make("llama", 2)
    other = merge(recipe_of(make("llama", 2, parent="other", hidden_size=64)), tmp_path / "merged", progress=False).where
    whole = single.result_files

    def interfere(plan: MergePlan) -> dict[str, bytes]:
        (tmp_path / "out" / "model.safetensors").write_bytes((Path(other) / "model.safetensors").read_bytes())
        return whole(plan)

    monkeypatch.setattr(single, "result_files", interfere)
    with pytest.raises(MergeError, match="does not hold what was merged"):
        merge(recipe_of(folders), tmp_path / "out", progress=False)
    assert (tmp_path / "out" / MARKER).exists()
