"""The processes that share a merge: accelerate's, or this one alone.

accelerate is imported only where there is something for it to find, another process or a device: it takes longer than a small
merge.
"""

import importlib
import os
from typing import Any, Protocol

import torch

_LAUNCHED = (
    "WORLD_SIZE",
    "LOCAL_RANK",
    "RANK",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "ACCELERATE_USE_CPU",
)
"""Variables that launchers set (accelerate launch, torchrun, MPI)."""


class Processes(Protocol):
    """What a merge asks of accelerate's `PartialState`."""

    process_index: int
    num_processes: int
    is_main_process: bool
    is_local_main_process: bool
    device: torch.device

    def wait_for_everyone(self) -> None:
        """Go on when all processes are here."""


class _Alone:
    process_index, num_processes = 0, 1
    is_main_process = is_local_main_process = True
    device = torch.device("cpu")

    def wait_for_everyone(self) -> None:
        pass


def processes() -> Processes:
    """All processes of this merge."""
    if any(name in os.environ for name in _LAUNCHED) or torch.accelerator.is_available():
        state: Processes = importlib.import_module("accelerate").PartialState()
        return state
    return _Alone()


def gathered(state: Processes, objects: list[Any]) -> list[Any]:
    """The objects of all processes."""
    return objects if state.num_processes == 1 else list(importlib.import_module("accelerate.utils").gather_object(objects))


def told(state: Processes, text: str) -> str:
    """The main process's text, to all of them."""
    if state.num_processes == 1:
        return text
    shared = [text]
    importlib.import_module("accelerate.utils").broadcast_object_list(shared)
    return shared[0]
