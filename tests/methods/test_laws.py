"""Laws that every merge method keeps. A new method inherits them by standing in the table."""

import inspect
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_merge.methods import METHODS, method
from hf_merge.methods.method import RESERVED, Method
from hf_merge.tensors.rng import Draws

SHAPES = [(), (0,), (1,), (1, 1), (3, 1), (64,), (99,), (5, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DENSITIES = [0.0, 0.01, 0.5, 1.0]
NAMES = ("ada", "bob", "cyd")
WEIGHTS = (0.5, 1.25, 0.75)

ALL = [pytest.param(m, id=m.name) for m in METHODS.values()]
RANDOM = [pytest.param(m, id=m.name) for m in METHODS.values() if m.random]
DELTA = [pytest.param(m, id=m.name) for m in METHODS.values() if m.space == "delta"]
UNORDERED = [m for m in METHODS.values() if not m.ordered]
ORDERED = [pytest.param(m, id=m.name) for m in METHODS.values() if m.ordered]
TRIMS = [pytest.param(m, id=m.name) for m in METHODS.values() if not m.random and "density" in m.parameters]

# Laws that are not some methods' to keep, and why.
NOT_ITSELF_ALONE = {
    "iso_c": "gives all directions the same size",
    "paint": "goes the part t of the way",
    "pcb": "clamps the outliers and keeps the fraction `ratio`",
}
NOT_THE_MEAN_OF_EQUALS = NOT_ITSELF_ALONE | {
    "tsv": "keeps 1/K of each model's directions",
    "wudi": "K equal deltas with weight 1/K merge to one of the K",
}
NOT_HOMOGENEOUS = {
    "pcb": "tanh of a product of deltas depends on their units",
    "arcee_fusion": "softmax of weights depends on their units",
    "nearswap": "its step is a distance between weights",
    "ram": "its threshold is a magnitude of deltas",
    "ramplus_tl": "its threshold is a magnitude of deltas",
}


def all_but(exempt, methods=ALL):
    return pytest.mark.parametrize("merge", [p for p in methods if p.values[0].name not in exempt])


def at_densities(methods):
    pairs = [(m, d) for m in methods for d in (DENSITIES if "density" in m.parameters else [1.0])]
    return pytest.mark.parametrize(("merge", "density"), [pytest.param(m, d, id=f"{m.name}-{d}") for m, d in pairs])


def switched():
    """Every method with its defaults, and with each of its switches turned."""
    for m in METHODS.values():
        switches = [name for name, p in m.parameters.items() if isinstance(p.default, bool)]
        for turned in [{}, *({name: not m.parameters[name].default} for name in switches)]:
            yield pytest.param(m, turned, id=f"{m.name}-{'-'.join(turned)}")


every_method_and_density = at_densities(METHODS.values())
every_method_and_switch = pytest.mark.parametrize(("merge", "turned"), list(switched()))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def how_many(merge: Method) -> int:
    return merge.models[1] or 3


def models_of(merge, shape, dtype=torch.float32, seed=0):
    """A base and models near it, in `dtype`; and the stack that the method gets of them."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).to(dtype)
    models = [(base.float() + 0.1 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(how_many(merge))]
    return base, models, stacked(merge, base, models)


def stacked(merge, base, models):
    return torch.stack([m.float() - base.float() if merge.deltas(base=True) else m.float() for m in models])


def numbers(merge, density=None, weights=WEIGHTS):
    found = {"density": density} if "density" in merge.parameters and density is not None else {}
    return found | ({"weights": list(weights)[: how_many(merge)]} if "weight" in merge.parameters else {})


def run(merge, stack, density=None, weights=WEIGHTS, names=NAMES, **other):
    return merge(stack, models=names[: len(stack)], tensor="layers.0.weight", **numbers(merge, density, weights), **other)


@every_method_and_density
@every_shape
@every_dtype
def test_no_change_merges_to_no_change(merge, density, shape, dtype):
    base, models, _ = models_of(merge, shape, dtype)
    merged = run(merge, stacked(merge, base, [base] * len(models)), density)
    if merge.deltas(base=True):
        assert torch.equal(merged, torch.zeros(shape))
    else:
        assert torch.equal(merged.to(dtype), base) or torch.allclose(merged, base.float(), rtol=3e-7, atol=0)


@all_but(NOT_THE_MEAN_OF_EQUALS)
@every_shape
@every_dtype
def test_equal_models_merge_to_themselves_at_full_density(merge, shape, dtype):
    base, models, _ = models_of(merge, shape, dtype)
    stack = stacked(merge, base, [models[0]] * len(models))
    merged = run(merge, stack, 1.0, weights=[1 / len(models)] * len(models))
    torch.testing.assert_close(merged, stack[0], rtol=3e-7, atol=0)


@at_densities(UNORDERED)
@every_shape
@every_dtype
@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0)], ids=str)
def test_the_order_of_models_with_their_weights_does_not_matter(merge, density, shape, dtype, order):
    _, _, stack = models_of(merge, shape, dtype)
    order = [k for k in order if k < len(stack)]
    shuffled = run(merge, stack[order], density, [WEIGHTS[k] for k in order], tuple(NAMES[k] for k in order))
    torch.testing.assert_close(shuffled, run(merge, stack, density), rtol=1e-5, atol=1e-7)


# A mean of directions that cancel has none.
@at_densities([m for m in UNORDERED if how_many(m) == 3 and (m.space == "delta" or m.measure is None)])
def test_the_order_of_models_does_not_matter_where_coarse_deltas_cancel_exactly(merge, density):
    first, second = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    stack = torch.stack([first, second, -(first + second)])
    merged = run(merge, stack, density, [0.4] * 3)
    backwards = run(merge, stack.flip(0), density, [0.4] * 3, NAMES[::-1])
    torch.testing.assert_close(backwards, merged, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("merge", ORDERED)
def test_a_method_that_declares_an_order_has_one(merge):
    _, _, stack = models_of(merge, (64,))
    part = {"t": 0.25} if "t" in merge.parameters else {}
    assert not torch.allclose(run(merge, stack.flip(0), **part), run(merge, stack, **part))


@every_method_and_density
@every_shape
def test_inputs_are_untouched(merge, density, shape):
    _, _, stack = models_of(merge, shape)
    arguments = numbers(merge, density)
    before, arguments_before = stack.clone(), {k: list(v) if isinstance(v, list) else v for k, v in arguments.items()}
    merge(stack, **arguments)
    assert torch.equal(stack, before)
    assert arguments == arguments_before


@every_method_and_density
@every_shape
def test_the_result_is_float32_and_has_the_tensors_shape(merge, density, shape):
    _, _, stack = models_of(merge, shape)
    merged = run(merge, stack, density)
    assert (merged.shape, merged.dtype) == (torch.Size(shape), torch.float32)


@every_method_and_density
@pytest.mark.parametrize("scale", [1e30, 1.0, 1e-30, 1e-42, 0.0])
@pytest.mark.parametrize("shape", [(1,), (99,), (5, 7)], ids=str)
def test_the_result_is_finite(merge, density, scale, shape):
    _, _, stack = models_of(merge, shape)
    assert run(merge, stack * scale, density).isfinite().all()


@at_densities([m for m in METHODS.values() if m.space == "delta" and "weight" in m.parameters])
@every_shape
def test_weights_of_zero_leave_the_base(merge, density, shape):
    _, _, stack = models_of(merge, shape)
    assert torch.equal(run(merge, stack, density, weights=[0.0] * 3), torch.zeros(shape))


@every_method_and_density
@every_shape
@every_dtype
def test_the_same_seed_gives_the_same_bits(merge, density, shape, dtype):
    _, _, stack = models_of(merge, shape, dtype)
    torch.manual_seed(1)
    first = run(merge, stack, density, seed=7)
    torch.manual_seed(2)
    assert torch.equal(run(merge, stack, density, seed=7), first)


@pytest.mark.parametrize("merge", ALL)
@pytest.mark.parametrize("key", [{"seed": 1}, {"tensor": "layers.1.weight"}, {"models": ("ada", "bob", "eve")}], ids=str)
def test_seed_and_names_matter_only_to_random_methods(merge, key):
    _, _, stack = models_of(merge, (256,))
    given = {"seed": 0, "tensor": "layers.0.weight", "models": NAMES} | key
    given["models"] = given["models"][-len(stack) :]
    usual = merge(stack, seed=0, tensor="layers.0.weight", models=NAMES[-len(stack) :], **numbers(merge, 0.5))
    assert torch.equal(merge(stack, **given, **numbers(merge, 0.5)), usual) is not merge.random


@every_method_and_switch
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", [(1,), (16,), (99,), (5, 7)], ids=str)
def test_streaming_through_one_buffer_gives_the_bits_of_the_tensor_in_memory(merge, turned, density, shape, monkeypatch):
    monkeypatch.setattr(method, "BLOCK", 16)
    _, _, stack = models_of(merge, shape)
    flat, arguments, names = stack.reshape(len(stack), -1), numbers(merge, density) | turned, NAMES[: len(stack)]
    size = merge.block_size(shape)
    buffer, starts = torch.empty(len(stack), size), range(0, flat.shape[1], size)

    def block(start):
        values = flat[:, start : start + size]
        return buffer[:, : values.shape[1]].copy_(values)

    def draws(number):
        return Draws(3, names, "w", number)

    measured = merge.measured(lambda: (block(s) for s in starts), flat.shape[1], arguments, shape=shape, draws=draws)
    parts = {
        s: merge.merge_block(block(s), arguments, rng=draws(s // size), measured=measured, start=s, shape=shape)
        for s in reversed(starts)
    }
    streamed = torch.cat([parts[s] for s in starts]).reshape(shape)
    assert torch.equal(streamed, merge(stack, seed=3, models=names, tensor="w", **arguments))


@every_method_and_density
def test_another_layout_in_memory_gives_the_same_bits(merge, density):
    _, _, stack = models_of(merge, (33, 31))
    strided = torch.empty(33, 31, 2 * len(stack)).permute(2, 0, 1)[::2].copy_(stack)
    assert not strided.is_contiguous()
    assert torch.equal(run(merge, strided, density), run(merge, stack, density))


@every_method_and_density
def test_the_number_of_threads_does_not_matter(merge, density):
    _, _, stack = models_of(merge, (300_000,))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(merge, stack, density)
        torch.set_num_threads(2)
        two = run(merge, stack, density)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)


@at_densities([m for m in METHODS.values() if not m.random])
@pytest.mark.parametrize("block", [1, 7, 16, 98])
def test_the_block_size_matters_only_to_random_methods(merge, density, block, monkeypatch):
    _, _, stack = models_of(merge, (99,))
    whole = run(merge, stack, density)
    monkeypatch.setattr(method, "BLOCK", block)
    torch.testing.assert_close(run(merge, stack, density), whole, rtol=1e-6 if merge.name == "slerp" else 0, atol=0)


def measures(merge):
    def draws(number):
        return Draws(0, NAMES, "w", number)

    stack = torch.eye(how_many(merge), 4)
    return merge.block != "elements" or merge.measured(lambda: [stack], 4, {}, shape=(4,), draws=draws) is not None


@at_densities([m for m in METHODS.values() if not measures(m)])
def test_an_element_does_not_depend_on_the_others_unless_they_are_measured(merge, density):
    _, _, stack = models_of(merge, (99,))
    other = torch.where(torch.arange(99) % 3 == 0, stack, 5 - 2 * stack)
    assert torch.equal(run(merge, other, density)[::3], run(merge, stack, density)[::3])


@pytest.mark.parametrize("merge", RANDOM)
def test_different_blocks_get_different_masks(merge, monkeypatch):
    monkeypatch.setattr(method, "BLOCK", 64)
    merged = run(merge, torch.ones(3, 128), 0.5)
    assert not torch.equal(merged[:64], merged[64:])


@pytest.mark.parametrize("merge", RANDOM)
def test_different_models_get_different_masks(merge):
    stack = torch.ones(3, 256)
    alone = [merge(stack[:1], models=(name,), tensor="w", density=0.5) for name in NAMES]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(alone, 2))


@pytest.mark.parametrize("merge", RANDOM)
def test_a_models_mask_does_not_depend_on_which_models_stand_beside_it(merge):
    stack = torch.zeros(3, 256)
    stack[1] = 1
    among = merge(stack, models=NAMES, tensor="w", density=0.5)
    alone = merge(stack[1:2], models=("bob",), tensor="w", density=0.5)
    assert torch.equal(among, alone)


@all_but(NOT_ITSELF_ALONE, [p for p in ALL if p.values[0].models[0] == 1])
@every_shape
@every_dtype
def test_one_model_with_weight_and_density_one_is_itself_bit_for_bit(merge, shape, dtype):
    _, _, stack = models_of(merge, shape, dtype)
    assert torch.equal(merge(stack[:1], **numbers(merge, 1.0, weights=[1.0])), stack[0])


@at_densities([m for m in METHODS.values() if m.name not in NOT_HOMOGENEOUS])
@pytest.mark.parametrize("shape", [(1,), (99,), (5, 7)], ids=str)
@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_merging_commutes_with_scaling_by_a_power_of_two_bit_for_bit(merge, density, shape, factor):
    _, _, stack = models_of(merge, shape)
    assert torch.equal(run(merge, factor * stack, density), factor * run(merge, stack, density))


@at_densities([m for m in METHODS.values() if m.name not in NOT_HOMOGENEOUS])
@settings(derandomize=True, deadline=None, max_examples=20)
@given(factor=st.floats(0.0625, 64, width=32))
def test_merging_commutes_with_positive_scaling(merge, density, factor):
    _, _, stack = models_of(merge, (99,))
    torch.testing.assert_close(
        run(merge, factor * stack, density), factor * run(merge, stack, density), rtol=1e-5, atol=1e-7 * factor
    )


@all_but(NOT_ITSELF_ALONE, [p for p in DELTA if "weight" in p.values[0].parameters])
@every_shape
def test_one_model_with_weight_minus_one_is_negated(merge, shape):
    _, _, stack = models_of(merge, shape)
    assert torch.equal(merge(stack[:1], **numbers(merge, 1.0, weights=[-1.0])), -stack[0])


@pytest.mark.parametrize("merge", TRIMS)
@every_shape
@every_dtype
@pytest.mark.parametrize("density", [*DENSITIES, 0.1, 0.3, 0.7, 0.9])
def test_a_sparsifier_keeps_the_rounded_number_of_elements(merge, shape, dtype, density):
    _, _, stack = models_of(merge, shape, dtype)
    stack = stack.where(stack != 0, 1e-3)
    n = stack[0].numel()
    merged = merge(stack[:1], density=density, **({"row_wise": False} if "row_wise" in merge.parameters else {}))
    assert int(merged.count_nonzero()) == (max(1, round(density * n)) if density and n else 0)


@pytest.mark.parametrize("merge", ALL)
def test_a_method_stands_in_the_table_under_its_modules_name_with_title_and_paper(merge):
    assert METHODS[merge.name] is merge
    assert merge.function.__module__ == f"hf_merge.methods.{merge.name}"
    assert merge.title
    assert merge.paper.startswith(("arXiv:", "doi:", "https://"))


@pytest.mark.parametrize("merge", ALL)
def test_everything_but_the_stack_is_keyword_only_and_hyperparameters_have_defaults(merge):
    _, *rest = inspect.signature(merge.function).parameters.values()
    assert {p.kind for p in rest} <= {inspect.Parameter.KEYWORD_ONLY}
    assert all(p.default is not p.empty for p in rest if p.name not in RESERVED)


@pytest.mark.parametrize("merge", [p for p in ALL if p.values[0].measure])
def test_measure_has_the_defaults_of_merge(merge):
    _, _, *shared = inspect.signature(merge.measure).parameters.values()
    shared = [p for p in shared if p.name not in RESERVED]
    merges = inspect.signature(merge.function).parameters
    assert {p.name: p.default for p in shared} == {p.name: merges[p.name].default for p in shared}


@pytest.mark.parametrize("merge", ALL)
def test_the_defaults_merge(merge):
    _, _, stack = models_of(merge, (5, 7))
    assert merge(stack).isfinite().all()


def test_hyperparameters_are_read_from_the_signature():
    found = METHODS["ties"].parameters
    assert {name: (p.default, p.per_model) for name, p in found.items()} == {
        "weight": (1.0, True),
        "density": (0.2, True),
        "normalize": (True, False),
        "weighted_election": (True, False),
        "whole_model": (False, False),
        "match_l1": (False, False),
        "round_down": (False, False),
        "scaling": (1.0, False),
    }


def test_only_methods_that_can_work_on_deltas_have_a_scaling():
    assert {m.name for m in METHODS.values() if "scaling" in m.parameters} == {
        m.name for m in METHODS.values() if m.space != "weight"
    }


def test_an_argument_that_a_method_does_not_have_is_refused():
    with pytest.raises(TypeError, match="desnity"):
        METHODS["ties"](torch.ones(2, 3), desnity=0.5)


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        METHODS["mine"] = replace(METHODS["ties"], name="mine")  # type: ignore[index]


@every_method_and_switch
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e30, 1.0, 1e-42, 0.0])
def test_the_result_is_finite_whatever_is_switched(merge, turned, shape, scale):
    _, _, stack = models_of(merge, shape)
    assert run(merge, stack * scale, 0.5, **turned).isfinite().all()
