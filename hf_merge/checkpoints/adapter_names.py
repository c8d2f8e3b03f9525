"""Names of an adapter's tensors: what each is, and which tensor of the base it belongs to."""

import re
from collections.abc import Collection, Iterable

_PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>(embedding_)?[AB])(\.default)?(\.weight)?")
MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.default)?(\.weight)?")
BIAS = re.compile(r"(?P<module>.+)\.lora_B(\.default)?\.bias")
TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.default)?")
_OTHER = re.compile(r"\.(lora_|token_adapter\.|ia3_|hada_|lokr_|oft_|vera_)")
_WRAPPER = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")


def of_kind(kind: re.Pattern[str], keys: Iterable[str]) -> dict[str, re.Match[str]]:
    """The names in a file that are of a kind, each with its match: `module` is the base's."""
    found = {key: kind.fullmatch(key.removeprefix(_PREFIX)) for key in keys}
    return {key: match for key, match in found.items() if match}


def full_name(key: str) -> str | None:
    """The tensor of the base that stands in full under a name; None for parts of changes, and for copies that nothing reads.

    Raises `ValueError` for a tensor of another kind.
    """
    name = key.removeprefix(_PREFIX)
    if any(kind.fullmatch(name) for kind in (FACTOR, MAGNITUDE, BIAS, TOKENS)) or ".original_module." in name:
        return None
    if _OTHER.search(f".{name}"):
        raise ValueError(key)
    return _WRAPPER.sub("", name)


def is_wrapped(key: str) -> bool:
    """Whether a name goes through one of the wrappers that PEFT puts around modules."""
    return bool(_WRAPPER.search(key))


def locate(name: str, known: Collection[str]) -> str | None:
    """The one of `known` that an adapter's tensor is: that name, or the only one that differs by a prefix (`model.`, `bert.`),
    which checkpoints saved from a bare model do not have, or have in addition."""
    if name in known:
        return name
    close = [other for other in known if other.partition(".")[2] == name or other == name.partition(".")[2]]
    return close[0] if len(close) == 1 else None
