"""The table of merge methods: one file, one function, one `METHOD` line each."""

from collections.abc import Mapping
from types import MappingProxyType

from hf_merge.methods import (
    consensus,
    dare_linear,
    dare_ties,
    karcher,
    linear,
    magmax,
    model_stock,
    multislerp,
    slerp,
    task_arithmetic,
    ties,
)
from hf_merge.methods.method import Method

_TABLE = (
    linear,
    slerp,
    multislerp,
    karcher,
    task_arithmetic,
    ties,
    dare_linear,
    dare_ties,
    model_stock,
    magmax,
    consensus,
)
METHODS: Mapping[str, Method] = MappingProxyType({module.METHOD.name: module.METHOD for module in _TABLE})
