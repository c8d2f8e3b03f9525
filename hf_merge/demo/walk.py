"""The demo's outer half: a Hub in a process of its own, and the story in another one that takes it for *the* Hub.

The Hub's address is read when Hub clients are imported, so nothing here imports one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

from hf_merge.demo.hub.server import LocalHub
from hf_merge.errors import HfMergeError

MARKER = ".hf_merge_demo"
SUMMARY = "summary.json"


def walk(
    folder: Path, *, trials: int, seed: int, cards: Path | None = None, progress: bool = True, tell_to: TextIO | None = None
) -> dict[str, Any]:
    """Run the demo in `folder`, anew each time (the specialists are cached elsewhere), telling it to standard output or
    `tell_to`; returns its summary.

    Raises `HfMergeError` if the folder holds anything but an earlier demo, or if the story ends badly.
    """
    where = folder.expanduser().resolve()
    if where.exists() and any(where.iterdir()) and not (where / MARKER).exists():
        raise HfMergeError(f"{where} holds something else than a demo. Give another folder (--folder).")
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    (where / MARKER).touch()
    with LocalHub.spawn(where / "hub") as hub:
        environment = {
            **os.environ,
            **hub.environment(),
            "HF_HOME": str(where / "hf_home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        command = [sys.executable, "-m", "hf_merge.demo.story", str(where), "--trials", str(trials), "--seed", str(seed)]
        command += ["--cards", str(cards.resolve())] if cards else []
        command += [] if progress else ["--quiet"]
        ended = subprocess.run(command, env=environment, stdout=tell_to, check=False)
    if ended.returncode:
        raise HfMergeError(f"The demo ended with exit code {ended.returncode}; what went wrong stands above.")
    found: dict[str, Any] = json.loads((where / SUMMARY).read_text())
    return found
