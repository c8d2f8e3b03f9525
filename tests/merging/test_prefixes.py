"""Paths that start alike share what they have run: the same bits, fewer layers run."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from path_models import IDS, MIXED, SCALED, dare_ties, family, path_model, steps
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from hf_merge.evaluation.measure import Evaluator
from hf_merge.evaluation.objective import Objective
from hf_merge.merging.path_model import PathModel
from hf_merge.merging.prefixes import Prefixes
from hf_merge.recipes.path import Path as Steps

PATHS = (
    MIXED,
    MIXED[:5],
    (*MIXED[:4], *steps(("model2", 2), ("model2", 3))),
    SCALED,
    (*SCALED[:3], *MIXED[3:]),
    steps(("model2", 0), *((step.model, step.layer) for step in MIXED[1:])),
    MIXED,
)
"""Prefixes of each other, branches, other scales, another first layer, a repetition."""
TEN = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])


def logits(model: PreTrainedModel, **more: Any) -> Tensor:
    with torch.inference_mode():
        return model(IDS, **more).logits


def generated(model: PreTrainedModel, **more: Any) -> Tensor:
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | more
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)


def both(root: Path, name: str, **limit: int) -> tuple[PathModel, PathModel, Prefixes]:
    recipe, prefixes = dare_ties(family(root, name)), Prefixes(**limit)
    return path_model(recipe), path_model(recipe, prefixes), prefixes


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("bert", logits),
        *((n, run) for n in ("llama", "qwen2", "gpt2", "gemma2", "neox", "mixtral") for run in (logits, generated)),
    ],
)
def test_what_is_shared_is_the_same_bit_for_bit(name: str, run: Callable[..., Tensor], tmp_path: Path) -> None:
    plain, shared, prefixes = both(tmp_path, name)
    for path in PATHS:
        assert torch.equal(run(plain.take(path)), run(shared.take(path)))
    assert prefixes.done < 0.8 * prefixes.asked


@pytest.mark.parametrize(("run", "tokens"), [(logits, 16), (generated, 16 + 5 * 2)])
def test_each_layer_of_each_token_is_run_once(run: Callable[..., Tensor], tokens: int, tmp_path: Path) -> None:
    _, shared, prefixes = both(tmp_path, "llama")
    run(shared.take(MIXED))
    assert (prefixes.asked, prefixes.done) == (7 * tokens, 7 * tokens)
    run(shared.take(MIXED))
    assert (prefixes.asked, prefixes.done) == (14 * tokens, 7 * tokens)


def test_a_branch_runs_what_comes_after_it(tmp_path: Path) -> None:
    _, shared, prefixes = both(tmp_path, "llama")
    logits(shared.take(MIXED))
    before = prefixes.done
    logits(shared.take((*MIXED[:5], *steps(("model2", 0)))))
    assert prefixes.done - before == 16


@pytest.mark.parametrize("changed", ["ids", "mask", "cache"])
def test_other_inputs_are_other_batches(changed: str, tmp_path: Path) -> None:
    plain, shared, _ = both(tmp_path, "llama")
    logits(shared.take(MIXED))
    more = {"ids": {}, "mask": {"attention_mask": TEN}, "cache": {"use_cache": False}}[changed]
    ids = IDS.flip(0) if changed == "ids" else IDS
    with torch.inference_mode():
        assert torch.equal(shared.model(ids, **more).logits, plain.take(MIXED)(ids, **more).logits)


def test_a_new_merge_shares_only_what_stands_before_its_layers(tmp_path: Path) -> None:
    plain, shared, prefixes = both(tmp_path, "llama")
    other = dare_ties([tmp_path / name for name in ("base", "model1", "model2")], parameters={"weight": 0.1})
    logits(shared.take(MIXED))
    before = prefixes.done
    for model in (plain, shared):
        model.load(other)
    assert torch.equal(logits(plain.take(MIXED)), logits(shared.model))
    assert prefixes.done - before == 6 * 16


@pytest.mark.parametrize("run", [logits, generated])
def test_little_memory_costs_runs_and_no_bits(run: Callable[..., Tensor], tmp_path: Path) -> None:
    plain, shared, prefixes = both(tmp_path, "llama", limit=20_000)
    for path in PATHS:
        assert torch.equal(run(plain.take(path)), run(shared.take(path)))
        assert prefixes.nbytes <= 20_000
    assert prefixes.done > 16


@pytest.mark.parametrize("more", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_caches_that_are_reordered_are_run_in_full(more: dict[str, int], tmp_path: Path) -> None:
    plain, shared, _ = both(tmp_path, "llama")
    for path in PATHS:
        assert torch.equal(generated(plain.take(path), **more), generated(shared.take(path), **more))


def test_a_cache_that_was_reordered_has_another_history(tmp_path: Path) -> None:
    models = both(tmp_path, "llama")[:2]
    for swapped in (False, True):
        found = []
        for model in models:
            cache = DynamicCache()
            with torch.inference_mode():
                model.take(MIXED)(IDS, past_key_values=cache)
                if swapped:
                    cache.reorder_cache(torch.tensor([1, 0]))
                found.append(model.model(torch.tensor([[5], [5]]), past_key_values=cache).logits)
        assert torch.equal(*found)


def test_generation_that_parts_goes_on_by_itself(tmp_path: Path) -> None:
    plain, shared, prefixes = both(tmp_path, "llama")
    other = (*MIXED[:-1], *steps(("model1", 3, 0.3)))
    texts = []
    for path in (MIXED, other):
        texts.append(generated(plain.take(path), max_new_tokens=20))
        assert torch.equal(texts[-1], generated(shared.take(path), max_new_tokens=20))
    assert not torch.equal(*texts)
    assert prefixes.done < prefixes.asked


def test_nothing_is_shared_or_kept_or_counted_in_a_pause(tmp_path: Path) -> None:
    _, shared, prefixes = both(tmp_path, "llama")
    with prefixes.paused():
        logits(shared.take(MIXED))
    assert (prefixes.asked, prefixes.done, prefixes.nbytes) == (0, 0, 0)


def test_what_is_forgotten_is_run_again(tmp_path: Path) -> None:
    _, shared, prefixes = both(tmp_path, "llama")
    logits(shared.take(MIXED))
    prefixes.clear()
    logits(shared.model)
    assert prefixes.done == prefixes.asked


def test_a_failed_pass_leaves_nothing_behind(tmp_path: Path) -> None:
    plain, shared, _ = both(tmp_path, "llama")
    with pytest.raises(IndexError):
        shared.take(MIXED)(torch.tensor([[96]]))
    assert torch.equal(logits(shared.model), logits(plain.take(MIXED)))


OBJECTIVES = {
    "language-modeling": {"task": "language-modeling"},
    "text-generation": {"task": "text-generation", "metric": "chrf", "max_new_tokens": 3},
    "token accuracy": {"task": "language-modeling", "metric": "token_accuracy"},
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_evaluator_measures_the_same_with_and_without(kind: str, tmp_path: Path) -> None:
    plain, shared, prefixes = both(tmp_path, "llama")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w1", eos_token="w2")
    texts = [" ".join(f"w{3 + (7 * i * j + i + j) % 90}" for j in range(2 + i % 5)) for i in range(24)]
    rows = Dataset.from_dict({"text": texts, "label": ["w5 w6 w7"] * 24})
    data = DatasetDict({"search": rows.select(range(12)), "held_out": rows.select(range(12, 24))})
    objective = Objective(name="o", dataset=data, batch_size=4, **OBJECTIVES[kind])  # type: ignore[arg-type]
    evaluator = Evaluator([objective], config=plain.model.config, tokenizer=tokenizer, progress=False, device="cpu")
    for path in PATHS:
        one, other = (evaluator.measure(model.take(path))["o"] for model in (plain, shared))
        assert (one.value, one.outcomes.tolist()) == (other.value, other.outcomes.tolist())
    assert prefixes.done < 0.8 * prefixes.asked


def walk(seed: int) -> Steps:
    """A path that is mostly the merge's own, as those of a search are after a while."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(4, generator=generator)
    return steps(*(("merged" if draw < 0.85 else "model1", i) for i, draw in enumerate(draws)))


def test_paths_like_a_searchs_run_less_than_half_of_their_layers(tmp_path: Path) -> None:
    _, shared, prefixes = both(tmp_path, "llama")
    for seed in range(30):
        logits(shared.take(walk(seed)))
    assert prefixes.asked > 2 * prefixes.done


def test_neighbors_in_a_run_of_prefixes_are_different_paths() -> None:
    assert all(one != other for one, other in pairwise(PATHS))
