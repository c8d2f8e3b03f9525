"""What an adapter's config says, and whether all of it is understood."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_merge.errors import CheckpointError

CONFIG = "adapter_config.json"
FOLD = "Fold it into a full model with PEFT (`merge_and_unload`), save that and merge the full model."

_UNDERSTOOD = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "use_dora",
        "bias",
        "modules_to_save",
        "init_lora_weights",
        "ensure_weight_tying",
        "base_model_name_or_path",
        "trainable_token_indices",
        "lora_bias",
    }
)
_HARMLESS = frozenset(
    {
        "task_type",
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "megatron_config",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "qalora_group_size",
        "runtime_config",
        "merge_weights",
    }
)
"""Settings that say how an adapter was trained or where it sits, which its tensors say as well."""
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initializations that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) rewrite it."""


_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Settings that choose the modules."""


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says. Raises `CheckpointError` for all that would change a delta and is not understood."""

    label: str
    content: Mapping[str, Any]

    def __post_init__(self) -> None:
        kind = self.content.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"{self.label}: a {kind!r} adapter; only LORA (with rsLoRA and DoRA) can be read. {FOLD}")
        unknown = [k for k, v in self.content.items() if v and k not in _UNDERSTOOD | _HARMLESS]
        if unknown:
            settings = ", ".join(f"{key}={self.content[key]!r}" for key in sorted(unknown))
            raise CheckpointError(f"{self.label}: {CONFIG} has settings that are not understood: {settings}. {FOLD}")
        init = self.content.get("init_lora_weights", True)
        if init not in _KEEPS_BASE:
            raise CheckpointError(
                f"{self.label}: init_lora_weights={init!r} rewrites the base, so the adapter is no delta from the base "
                "published. Save it with PEFT's `path_initial_model_for_weight_conversion`, or fold it into a full model."
            )
        ranks = [self.content.get("r"), *self._pattern("rank_pattern").values()]
        if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
            raise CheckpointError(f"{self.label}: ranks are positive whole numbers, {CONFIG} has {ranks}.")
        alphas = [self.content.get("lora_alpha"), *self._pattern("alpha_pattern").values()]
        if not all(isinstance(alpha, int | float) and math.isfinite(alpha) for alpha in alphas):
            raise CheckpointError(f"{self.label}: lora_alpha is a number, {CONFIG} has {alphas}.")

    @property
    def base(self) -> str | None:
        """The model that the adapter was trained on, as its author named it: a Hub id or a path."""
        return self.content.get("base_model_name_or_path") or None

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Ends of the names of modules that were trained in full."""
        given = self.content.get("modules_to_save") or ()
        return (given,) if isinstance(given, str) else tuple(map(str, given))

    def rank(self, module: str) -> int:
        """The rank of a module's factors."""
        return int(self._of(module, "rank_pattern", self.content["r"]))

    def scale(self, module: str) -> float:
        """What `B @ A` is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        rank, alpha = self.rank(module), float(self._of(module, "alpha_pattern", self.content["lora_alpha"]))
        return alpha / math.sqrt(rank) if self.content.get("use_rslora") else alpha / rank

    def tokens(self, module: str) -> list[int]:
        """The rows of an embedding that were trained by themselves, in the order in which they are saved."""
        given = self.content.get("trainable_token_indices") or []
        if isinstance(given, dict):
            given = next((rows for name, rows in given.items() if f".{module}".endswith(f".{name}")), [])
        if not isinstance(given, list) or not all(isinstance(row, int) and row >= 0 for row in given):
            raise CheckpointError(
                f"{self.label}: trainable_token_indices of {module!r} are numbers of rows, {CONFIG} has {given!r}."
            )
        return given

    def _pattern(self, key: str) -> dict[str, Any]:
        pattern = self.content.get(key) or {}
        if not isinstance(pattern, dict):
            raise CheckpointError(f"{self.label}: {key} is a mapping from modules to numbers, {CONFIG} has {pattern!r}.")
        return pattern

    def _of(self, module: str, key: str, default: Any) -> Any:
        for pattern, value in self._pattern(key).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise CheckpointError(f"{self.label}: {key} has {pattern!r}, which is no regular expression.") from error
        return default


def plain_config(parents: Sequence[AdapterConfig], ranks: Mapping[str, int], alike: bool) -> dict[str, Any]:
    """adapter_config.json of one plain LoRA adapter made of several, with the rank of each module.

    Alpha is r everywhere, so that B @ A is added as it is. The modules are listed in full, unless the parents are `alike` (each
    has all of them) and say so in the same words.
    """
    contents = [parent.content for parent in parents]
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    # Anchored, so that a pattern cannot match another module with the same end.
    pattern = {f"^{module}".replace(".", r"\."): rank for module, rank in ranks.items() if rank != common}
    same = alike and all(content.get(key) == contents[0].get(key) for content in contents for key in _SELECTION)
    selection = {key: contents[0].get(key) for key in _SELECTION} if same else {"target_modules": sorted(ranks)}
    saved = [module for parent in parents for module in parent.modules_to_save]
    biases = {str(content.get("bias") or "none") for content in contents}
    return {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "fan_in_fan_out": any(content.get("fan_in_fan_out") for content in contents),
        "bias": next(kind for kind in ("all", "lora_only", "none") if kind in biases),
        "modules_to_save": list(dict.fromkeys(saved)) or None,
        "ensure_weight_tying": any(content.get("ensure_weight_tying") for content in contents),
        **selection,
        **{key: _shared(contents, key) for key in ("base_model_name_or_path", "revision", "task_type", "auto_mapping")},
    }


def _shared(contents: Sequence[Mapping[str, Any]], key: str) -> Any:
    """A setting of those that have it, if it is the same."""
    values = [content[key] for content in contents if content.get(key) is not None]
    return values[0] if values and all(value == values[0] for value in values) else None
