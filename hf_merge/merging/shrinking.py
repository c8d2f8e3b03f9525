"""A config made small: a model of the same class and the same switches that takes milliseconds."""

import json
from collections.abc import Mapping
from typing import Any

_DEPTH, _HEADS, _HEAD = 3, 4, 16
_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), _DEPTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), _HEADS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), _HEADS * _HEAD),
    **dict.fromkeys(("head_dim", "d_kv", "query_pre_attn_scalar"), _HEAD),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "moe_intermediate_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    "shared_expert_intermediate_size": 48,
    "vocab_size": 97,
    "type_vocab_size": 2,
}


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with few layers, narrow ones, and few tokens; all else (switches, activations, kinds of norm) as it is."""
    found: dict[str, Any] = json.loads(json.dumps(dict(config), default=str))
    depth = next((config[key] for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if key in config), None)
    heads = next((config[key] for key in ("num_attention_heads", "n_head", "n_heads", "num_heads") if key in config), None)
    for key, value in config.items():
        if key in ("num_experts_per_tok", "moe_top_k"):
            found[key] = min(value, 2)
        elif key in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            found[key] = min(value, _SIZES[key]) if key in ("num_local_experts", "num_experts") else _SIZES[key]
        elif key == "num_key_value_heads" and value is not None:
            found[key] = _HEADS if value == heads else min(value, _HEADS // 2)
        elif key.endswith("_token_id") and value is not None:
            found[key] = 0
        elif isinstance(value, list) and len(value) == depth and key != "architectures":
            found[key] = value[:_DEPTH]
    return found | {"dtype": "float32", "torch_dtype": None, "pad_token_id": 0}
