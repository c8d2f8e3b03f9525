"""Scales of the residual stream, folded into the weights of a stock checkpoint.

A layer whose branches read the stream through a norm gives the same branch outputs for c·x as for x. So with the stream
multiplied by w_t before layer t, c_t = w_1 … w_t, the same result comes of dividing what the branches of layer t add by c_t,
and multiplying nothing; the last norm takes c_T away. Where layers end in a norm (BERT), that norm's gain is multiplied
instead. What of it holds for an architecture is not assumed: each way is tried on a small random model of the same class and
settings, scaled against folded, before a tensor is written.
"""

import json
import logging
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.errors import MergeError
from hf_merge.merging.architecture import model_class, model_config, without_bars
from hf_merge.merging.layers import Layers
from hf_merge.merging.shrinking import shrunk
from hf_merge.merging.targets import Composition
from hf_merge.model_ref import ModelRef

EPS_BOUND = 1e-3
"""Relative change of a norm's output, by its eps, above which a fold is warned of."""
_RANGE = 4.0
_TRIED = (1.3, 0.7, 1.6)
_EXACT = 5e-3
"""Share of what the scales change that a fold may miss: some norms' eps cannot be made small. A wrong fold misses a tenth."""
EPS_NAMES = ("eps", "variance_epsilon", "epsilon")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gain:
    """A tensor times `factor`, plus `shift`."""

    factor: float = 1.0
    shift: float = 0.0


UNCHANGED = Gain()


@dataclass(frozen=True)
class Fold:
    """A way to fold: the tensors of a layer that take a factor, by their names in it. Theirs is 1/c_t; with `before` it is what
    the stream is multiplied by before the next layer, and the tensors `before` the first one take part. A gain that is stored
    less `offset` (Gemma's 1 + g) stays so."""

    tensors: re.Pattern[str]
    offset: float = 0.0
    before: re.Pattern[str] | None = None

    def gains(self, stack: str, scales: Sequence[float], names: Sequence[str]) -> dict[str, Gain]:
        """The gain of each tensor that changes. `scales` are the stream's, layer by layer of the `stack`."""
        factors = [1 / c for c in accumulate(scales, mul)] if self.before is None else [*scales[1:], 1.0]
        found, start = {}, f"{stack}."
        for name in names:
            factor, inside = 1.0, name.startswith(start)
            number, _, rest = name.removeprefix(start).partition(".") if inside else ("", "", name)
            if inside and number.isdigit() and self.tensors.search(rest):
                factor = factors[int(number)]
            elif not inside and self.before is not None and self.before.search(name):
                factor = scales[0]
            if factor != 1.0:
                found[name] = Gain(factor, (factor - 1.0) * self.offset)
        return found


_OUTPUTS = re.compile(
    r"(^|\.)(o_proj|out_proj|c_proj|down_proj|Wo|fc2|fc_out|w2|dense_4h_to_h|(attention|self_attention|self_attn)\.dense)"
    r"(\.weight|\.bias|_bias)?$"
)
_BRANCH_NORMS = re.compile(r"^(post_attention_layernorm|post_feedforward_layernorm)\.")
_OTHER_BRANCH_NORMS = re.compile(r"^(post_self_attn_layernorm|post_mlp_layernorm)\.")
_LAST_NORM = re.compile(r"^(output\.LayerNorm|output_layer_norm|final_layer_norm|ln_2)\.(weight|bias)$")
_FIRST_NORM = re.compile(r"(^|\.)embeddings\.(LayerNorm|layer_norm)\.(weight|bias)$")
FOLDS = (
    Fold(_OUTPUTS),
    Fold(_BRANCH_NORMS, offset=1.0),
    Fold(_BRANCH_NORMS),
    Fold(_OTHER_BRANCH_NORMS),
    Fold(_LAST_NORM, before=_FIRST_NORM),
)
"""What is tried, in this order: the branches' output projections (pre-norm), the gains of norms after the branches (Gemma 2 and
3, stored less 1; or as they are, GLM 4), the norm at the end of the layer before (BERT)."""


def gains_of(composition: Composition, primary: Checkpoint) -> dict[str, Gain]:
    """The gain of each tensor that a composition's scales change. Raises `MergeError`, with the reason, where they cannot be
    folded; warns of scales whose product leaves the range of 2^±4."""
    scales = composition.scales
    fold = fold_of(composition.config, primary)
    worst = max(accumulate(scales, mul), key=lambda c: abs(math.log2(c)))
    if fold.before is None and abs(math.log2(worst)) > _RANGE:
        _log.warning("The scales' product reaches %.3g: beyond 2^±%g weights become too large for float16.", worst, _RANGE)
    return fold.gains(composition.stack, scales, [target.name for target in composition.targets])


def fold_of(config: Mapping[str, Any], primary: Checkpoint) -> Fold:
    """The way to fold that holds for models of this config. Raises `MergeError`, with the reason, if none does."""
    label = primary.label
    if config.get("is_encoder_decoder"):
        raise MergeError(
            f"{label}: scales of the residual stream cannot be folded into a model with an encoder and a decoder, which reads "
            "one stream at every layer of the other (and in T5 the first layer holds the positions of all). Take scales of 1."
        )
    if config.get("scale_attn_by_inverse_layer_idx"):
        raise MergeError(
            f"{label}: with scale_attn_by_inverse_layer_idx a layer's attention depends on its place, so layers that moved are "
            "other layers, and no scale is folded into them. Take scales of 1."
        )
    found = _tried(json.dumps(dict(config), sort_keys=True, default=str))
    if isinstance(found, Fold):
        return found
    raise MergeError(f"{label}: scales of the residual stream cannot be folded into its weights: {found}. Take scales of 1.")


@lru_cache(maxsize=64)
def _tried(settings: str) -> Fold | str:
    """The first way that holds on a small model of these settings; else why there is none."""
    config = shrunk(json.loads(settings))
    cls = model_class(config)
    if cls is None:
        return f"transformers has no class {config.get('architectures')!r} to try it on"
    try:
        # Random numbers of its own: a search's must not hang on what was tried.
        with torch.random.fork_rng(devices=[]), without_bars(), tempfile.TemporaryDirectory() as folder:
            return _try(cls, config, Path(folder))
    except Exception as error:  # what transformers' classes raise on settings that were made small is anything
        return f"a small {cls.__name__} to try it on cannot be made or run ({type(error).__name__}: {error})"


def _try(cls: type[Any], settings: Mapping[str, Any], folder: Path) -> Fold | str:
    checkpoint = _random_checkpoint(cls, settings, folder)
    state = {n: checkpoint.read(n).reshape(entry.shape) for n, entry in checkpoint.index.tensors.items()}
    depths = Layers(state).depths
    if len(depths) != 1:
        return f"its layers are not one stack but {', '.join(depths) or 'none'}"
    stack = next(iter(depths))
    scales = [_TRIED[i % len(_TRIED)] for i in range(depths[stack])]

    def run(tensors: Mapping[str, Tensor], scaled: bool) -> Tensor:
        config = model_config(checkpoint)
        model = cls.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=torch.float32).eval()
        with torch.no_grad(), hooked(model, scales if scaled else []):
            found: Tensor = model(torch.arange(3, 16).reshape(1, -1))[0]
        return found

    wanted, plain = run(state, True), run(state, False)
    effect, errors = float((wanted - plain).abs().max()), []
    for fold in FOLDS:
        gains = fold.gains(stack, scales, list(state))
        if not gains:
            continue
        folded = {n: t * gains[n].factor + gains[n].shift if n in gains else t for n, t in state.items()}
        errors.append(float((run(folded, False) - wanted).abs().max()))
        if errors[-1] <= _EXACT * effect:
            return fold
    if not errors:
        return f"{cls.__name__} has no tensors of a known name that could take a scale"
    return (
        f"in a {cls.__name__} a branch of a layer reads the stream itself and not its norm (as in OLMo 2), or there is a norm "
        f"in the way; on a small one folding misses by {min(errors):.2g} of {effect:.2g}"
    )


def _random_checkpoint(cls: type[Any], settings: Mapping[str, Any], folder: Path) -> Checkpoint:
    """A small model with random weights, gains and biases, and norms whose eps is next to nothing, as a checkpoint."""
    torch.manual_seed(0)
    (folder / "config.json").write_text(json.dumps(settings))
    config = model_config(Checkpoint(ModelRef(str(folder))))
    model = cls(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() < 2 else 0.05))
    model.save_pretrained(folder)
    return Checkpoint(ModelRef(str(folder)))


@contextmanager
def hooked(model: nn.Module, scales: Sequence[float]) -> Iterator[None]:
    """The model's residual stream multiplied before each layer, and its norms' eps next to nothing."""
    for module in model.modules():
        for name in EPS_NAMES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 1e-12)
    depths = Layers(name for name, _ in model.named_parameters()).depths
    blocks = list(model.get_submodule(next(iter(depths))).children())
    hooks = [b.register_forward_pre_hook(_scaling(s), with_kwargs=True) for b, s in zip(blocks, scales, strict=False)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _scaling(scale: float) -> Callable[..., Any]:
    def scaled(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (args[0] * scale, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * scale}

    return scaled
