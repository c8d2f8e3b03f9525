"""Whether layers of several models can stand in one model, from their configs alone; and the config of a path through them."""

from collections.abc import Iterator, Mapping, Sequence

from transformers import PreTrainedConfig

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.errors import MergeError
from hf_merge.merging.architecture import known_config, layer_lists

_ALIKE: Mapping[str, tuple[str, ...]] = {
    "the residual stream has one width": ("hidden_size", "n_embd", "d_model", "dim", "embedding_size"),
    "one config has one layout of heads for all layers": (
        *("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim", "multi_query"),
        *("attention_bias", "qkv_bias", "query_pre_attn_scalar", "attn_logit_softcapping", "sliding_window"),
    ),
    "one config has one kind of MLP for all layers": (
        *("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "hidden_act", "activation_function", "hidden_activation"),
        *("mlp_bias", "num_local_experts", "num_experts", "num_experts_per_tok", "use_parallel_residual", "parallel_attn"),
    ),
    "one config has one kind of norm for all layers": (
        *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "do_layer_norm_before"),
    ),
    "positions mean the same in all layers": (
        *("rope_parameters", "position_embedding_type", "alibi", "partial_rotary_factor", "rotary_dim", "n_positions"),
    ),
    "tokens mean the same in all models": ("vocab_size",),
    "the embeddings and the head are one tensor or two": ("tie_word_embeddings",),
    "layers are of one architecture": ("model_type", "is_encoder_decoder", "scale_attn_by_inverse_layer_idx"),
}
"""What models of one pool have in common, by the reason: the settings' names."""
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def pool_configs(checkpoints: Sequence[Checkpoint]) -> list[PreTrainedConfig]:
    """The models' configs, the first one's first.

    Raises `MergeError` that lists every reason why one model cannot have layers of all of them: nothing but configs is read.
    """
    configs = [known_config(checkpoint) for checkpoint in checkpoints]
    problems = list(_alone(checkpoints[0], configs[0]))
    for checkpoint, config in zip(checkpoints[1:], configs[1:], strict=True):
        problems += [f"{checkpoint.label}: {problem}" for problem in _unlike(checkpoints[0].label, configs[0], config)]
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise MergeError(f"Layers of these models cannot stand in one model:{listed}")
    return configs


def _alone(first: Checkpoint, config: PreTrainedConfig) -> Iterator[str]:
    if config.is_encoder_decoder:
        yield f"{first.label} has an encoder and a decoder: a path goes through one stack of layers."
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        yield (
            f"{first.label} has scale_attn_by_inverse_layer_idx: a layer's attention depends on its place, so a layer that "
            "moved is another one."
        )


def _unlike(label: str, first: PreTrainedConfig, other: PreTrainedConfig) -> Iterator[str]:
    a, b = first.to_dict(), other.to_dict()
    classes = [config.architectures or [] for config in (first, other)]
    if classes[0] != classes[1]:
        yield f"it is a {classes[1]}, {label} a {classes[0]}; layers are of one architecture."
    for reason, names in _ALIKE.items():
        for name in names:
            if a.get(name) != b.get(name):
                yield f"{name} is {b.get(name)!r}, {label} has {a.get(name)!r}; {reason}."


def depth_of(config: PreTrainedConfig) -> int:
    """The number of layers. Raises `MergeError` for a config that does not say it."""
    found = getattr(config, "num_hidden_layers", None)
    if not isinstance(found, int):
        raise MergeError(f"A {config.model_type} says no number of layers in its config.")
    return found


def follow(config: PreTrainedConfig, layers: Sequence[tuple[PreTrainedConfig, int]]) -> None:
    """Make `config` that of a model of these layers, each given as its model's config and its number there."""
    lists = {
        name: [getattr(own, name)[i] for own, i in layers]
        for name in layer_lists(layers[0][0].to_dict(), depth_of(layers[0][0]))
        if all(isinstance(getattr(own, name, None), list) for own, _ in layers)
    }
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    setattr(config, name, len(layers))
    for name, values in lists.items():
        setattr(config, name, values)
