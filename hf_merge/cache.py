"""Where hf_merge keeps on disk what may be lost."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder `name` in $HF_MERGE_CACHE, or in ~/.cache/hf_merge; it need not exist yet."""
    return Path(os.environ.get("HF_MERGE_CACHE") or "~/.cache/hf_merge").expanduser() / name
