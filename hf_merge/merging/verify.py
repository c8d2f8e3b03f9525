"""Whether a result will load: its tensors against what transformers makes of its config, on the meta device."""

import torch

from hf_merge.checkpoints.tensors import tensors
from hf_merge.errors import MergeError
from hf_merge.merging.architecture import model_class, model_config, refused, without_bars
from hf_merge.merging.plan import MergePlan


def has_the_primarys_layout(plan: MergePlan) -> bool:
    """Whether the result has the tensors, shapes and config of the model that lends them: it loads as that one does."""
    stored = tensors(plan.primary)
    same = plan.jobs.keys() == stored.keys() and all(job.spec.shape == stored[name].shape for name, job in plan.jobs.items())
    return same and plan.config == plan.primary.config


def verify(plan: MergePlan) -> None:
    """Raises `MergeError` if transformers would miss, not expect or not fit a tensor of the result; no weights are read.

    A model type that transformers does not know, or a config without an architecture, cannot be verified and passes. What is
    left over is no fault where the model that lends the layout has it as well, or the recipe's policy for `private` keeps it.
    """
    config, cls = model_config(plan.primary, plan.config), model_class(plan.config)
    if config is None or cls is None:
        return
    state = {name: torch.empty(job.spec.shape, dtype=job.spec.dtype, device="meta") for name, job in plan.jobs.items()}
    with refused(plan.primary), without_bars():
        _, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=state,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    allowed = {name for name, job in plan.jobs.items() if not job.spec.dtype.is_floating_point}
    if plan.recipe.layers is None:
        # transformers passes over what the primary holds beyond its class, and over heads that a policy keeps for another one.
        allowed |= {*tensors(plan.primary), *(name for name, job in plan.jobs.items() if job.method is None)}
    wrong = [f"missing {name}" for name in sorted(info["missing_keys"])]
    wrong += [f"unexpected {name}" for name in sorted(set(info["unexpected_keys"]) - allowed)]
    wrong += [f"of another shape {name}" for name in sorted(map(str, info["mismatched_keys"]))]
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise MergeError(f"The result would not load as {cls.__name__}: {', '.join(wrong[:10])}{more}.")
