"""Token ids and the vocabulary's size in config.json and generation_config.json, where a merge moves them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_merge.checkpoints.checkpoint import Checkpoint

_CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True, kw_only=True)
class Ids:
    """Rows and ids `before` and after: `moved` maps ids (None where ids stay), `special` are settings of the new tokenizer's
    model, `generation` its generation_config.json, which hold ids that need no translation."""

    before: int
    rows: int
    moved: Mapping[int, int] | None = None
    special: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] | None = None

    @classmethod
    def between(cls, before: int, rows: int, old: Mapping[str, int], new: Mapping[str, int], donor: Checkpoint | None) -> "Ids":
        """From the `old` ids by token to the `new` ones, which are those of `donor` if the tokenizer is not the primary's."""
        if donor is None:
            return cls(before=before, rows=rows)
        moved = {i: new[token] for token, i in old.items() if token in new}
        special = {key: value for key, value in donor.config.items() if _holds_ids(key)}
        return cls(before=before, rows=rows, moved=moved, special=special, generation=donor.json(_CONFIGS[1]))

    def in_files(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """The files with both configs changed; a file in which nothing changes stays as it is, to the byte."""
        found = dict(files)
        for name in _CONFIGS:
            content = json.loads(files.get(name, b"{}"))
            changed = translated(content, self)
            if name == _CONFIGS[1] and self.generation is not None:
                # Stop tokens and the like belong to the tokenizer; sampling settings to the primary.
                changed |= {key: value for key, value in self.generation.items() if _holds_ids(key)}
            if changed != content:
                found[name] = (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()
        return found


def translated(content: Mapping[str, Any], ids: Ids, top: bool = True) -> dict[str, Any]:
    """A config with the new vocabulary size and token ids, at the top and in its parts (`text_config`)."""
    found = dict(content)
    for key, value in content.items():
        if key == "vocab_size" and ids.rows != ids.before and (value == ids.before or top):
            found[key] = ids.rows
        elif isinstance(value, Mapping):
            found[key] = translated(value, ids, top=False)
        elif _holds_ids(key) and ids.moved is not None:
            found[key] = ids.special[key] if key in ids.special else _moved(value, ids.moved)
    return found


def _holds_ids(key: str) -> bool:
    return key.endswith(("_token_id", "suppress_tokens"))


def _moved(value: Any, moved: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [moved[i] for i in value if i in moved] or None
    return moved.get(value) if type(value) is int else value
