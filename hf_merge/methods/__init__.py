"""The table of merge methods: one file, one function, one `METHOD` line each."""

from collections.abc import Mapping
from types import MappingProxyType

from hf_merge.methods import dare_linear, dare_ties, linear, slerp, task_arithmetic, ties
from hf_merge.methods.method import Method

METHODS: Mapping[str, Method] = MappingProxyType(
    {m.METHOD.name: m.METHOD for m in (linear, slerp, task_arithmetic, ties, dare_linear, dare_ties)}
)
