"""The Hub in a process of its own: starting, ending, memory, restarts."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download

from hf_merge.demo.hub.server import LocalHub

MEGABYTE = 1 << 20


def test_a_killed_hub_has_lost_nothing_after_a_restart(tmp_path: Path) -> None:
    hub = LocalHub.spawn(tmp_path / "hub")
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("demo/model", private=True)
    commit = api.upload_file(path_or_fileobj=b"\0" * 1000, path_in_repo="a.bin", repo_id="demo/model")
    api.create_tag("demo/model", tag="v1")
    slug = api.create_collection("Front").slug
    assert hub.process is not None
    hub.process.kill()
    hub.stop()
    with LocalHub.spawn(tmp_path / "hub", port=hub.port) as again:
        assert again.endpoint == hub.endpoint
        assert api.repo_info("demo/model", revision="v1").sha == commit.oid
        assert api.get_collection(slug).title == "Front"


def test_large_files_pass_through_a_small_process(tmp_path: Path) -> None:
    size = 100 * MEGABYTE
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        for number in range(size // MEGABYTE):
            stream.write(number.to_bytes(2, "little") * (MEGABYTE // 2))
    with LocalHub.spawn(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("demo/model")
        api.create_commit("demo/model", [CommitOperationAdd(file.name, file)], commit_message="Weights")
        path = hf_hub_download("demo/model", file.name, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
        assert os.path.getsize(path) == size
        assert hub.process is not None
        status = Path(f"/proc/{hub.process.pid}/status")
        if not status.exists():
            pytest.skip("needs /proc")
        (peak,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        assert int(peak.split()[1]) < 90_000


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    script = f"""
import os
from pathlib import Path
from hf_merge.demo.hub.server import LocalHub
hub = LocalHub.spawn(Path({str(tmp_path / "hub")!r}))
print(hub.process.pid, flush=True)
os._exit(1)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    pid = int(run.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/status").exists() and "zombie" in Path(f"/proc/{pid}/status").read_text():
            return
        subprocess.run(["sleep", "0.05"], check=True)
    pytest.fail("the Hub outlived its parent")


def test_tokens_are_in_no_file_and_no_command_line(tmp_path: Path) -> None:
    with LocalHub.spawn(tmp_path / "hub", users={"hf_verysecret": "demo"}) as hub:
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("demo/model")
        assert "hf_verysecret" not in repr(hub.accounts)
        assert hub.process is not None
        assert "hf_verysecret" not in str(hub.process.args)
    contents = [path.read_bytes() for path in (tmp_path / "hub").rglob("*") if path.is_file()]
    assert contents
    assert not [content for content in contents if b"hf_verysecret" in content]


def test_the_server_imports_no_model_library(tmp_path: Path) -> None:
    script = "import sys, hf_merge.demo.hub.server; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "transformers", "datasets", "huggingface_hub", "numpy"} & set(run.stdout.split())


def test_commits_from_many_threads_and_processes_are_all_kept(tmp_path: Path) -> None:
    with LocalHub.spawn(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("demo/model")

        def commit(number: int) -> None:
            if number % 2:
                hub.seed("demo/model", {f"{number}.txt": b"seeded"})
            else:
                api.upload_file(path_or_fileobj=b"sent", path_in_repo=f"{number}.txt", repo_id="demo/model")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(commit, range(24)))
        assert len(api.list_repo_files("demo/model")) == 25
        assert len(list(api.list_repo_commits("demo/model"))) == 25


def test_a_hub_that_was_not_started_has_no_address(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="before start"):
        _ = LocalHub(tmp_path).endpoint


def test_seeding_needs_no_running_hub(tmp_path: Path) -> None:
    sha = LocalHub(tmp_path).seed("org/data", {"a.txt": "text"}, repo_type="dataset")
    with LocalHub(tmp_path) as hub:
        assert HfApi(endpoint=hub.endpoint, token=False).dataset_info("org/data").sha == sha
