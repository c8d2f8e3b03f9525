import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_merge.errors import PublishError
from hf_merge.model_ref import ModelRef
from hf_merge.publishing.card import render, usage
from hf_merge.publishing.facts import CardFacts
from hf_merge.recipes import yaml as recipe_yaml
from hf_merge.recipes.recipe import RecipeModel
from hf_merge.scores import Score
from hf_merge.search.trial import Front, Trial

GOLDEN = Path(__file__).parent / "golden" / "merge_card.md"


def tokens(card: ModelCard) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(card.text)


def section(card: ModelCard, title: str) -> str:
    return card.text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


# The whole


def test_the_card_is_the_golden_one(facts: CardFacts) -> None:
    content = render(facts).content
    assert content == GOLDEN.read_text(encoding="utf-8"), f"If the change is meant, write render(facts).content to {GOLDEN}."


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_a_card_survives_saving_and_loading(make_facts: Callable[..., CardFacts], tmp_path: Path, objectives: int) -> None:
    card = render(make_facts(objectives))
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.content == card.content
    assert loaded.data.to_dict() == card.data.to_dict()


def test_the_metadata_is_what_the_hub_reads(facts: CardFacts) -> None:
    data = render(facts).data.to_dict()
    assert data["base_model"] == ["demo/tiny-base", "demo/tiny-sentiment", "demo/tiny-question"]
    assert data["base_model_relation"] == "merge"
    assert data["tags"] == ["merge", "hf_merge", "ties", "pareto-front"]
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == (
        "transformers",
        "text-classification",
        "apache-2.0",
    )
    assert "datasets" not in data


def test_results_are_the_held_out_ones(facts: CardFacts) -> None:
    results = render(facts).data.eval_results
    assert {r.task_name: r.metric_value for r in results} == {n: s.value for n, s in facts.trial.held_out.items()}
    assert {r.dataset_split for r in results} == {"held_out"}


def test_numpy_values_become_plain_numbers(facts: CardFacts) -> None:
    held_out = {n: replace(s, value=np.float64(s.value)) for n, s in facts.trial.held_out.items()}
    content = render(replace(facts, trial=replace(facts.trial, held_out=held_out))).content
    assert "!!python" not in content
    assert yaml.safe_load(content.split("---")[1])


def test_a_value_that_is_not_finite_is_no_result(facts: CardFacts) -> None:
    held_out = {**facts.trial.held_out, "question": Score(value=float("nan"), examples=1)}
    results = render(replace(facts, front=None, trial=replace(facts.trial, held_out=held_out))).data.eval_results
    assert [r.task_name for r in results] == ["sentiment"]


def test_search_scores_stay_out_of_the_held_out_tables(facts: CardFacts) -> None:
    marked = {n: replace(s, value=0.123456) for n, s in facts.trial.scores.items()}
    trial = replace(facts.trial, scores=marked)
    assert facts.front is not None
    front = replace(facts.front, trials=tuple(trial if t.number == trial.number else t for t in facts.front))
    card = render(replace(facts, trial=trial, front=front))
    assert card.text.count("0.123 |") == 2
    details = card.text[card.text.index("<details>") : card.text.index("</details>")]
    assert details.count("0.123 |") == 2
    assert "0.123" not in str(card.data)


# Where it stands


def test_the_position_tells_rank_gaps_neighbors_and_knee(facts: CardFacts) -> None:
    text = section(render(facts), "Position on the Pareto front")
    assert "**Rank 1 of 31** on search data" in text
    assert "**Not dominated on held-out data**" in text
    assert (
        "Against the parent sentiment it gains 0.612 [0.552, 0.672] in question; gives up 0.068 [0.036, 0.100] in senti" in text
    )
    assert "**Neighbor** on the front, better in sentiment: trial 8, with +0.032 [0.012, 0.052] in sentiment and -0.044" in text
    assert "knee" in text


def test_a_front_point_that_held_out_data_dominates_is_marked(make_facts: Callable[..., CardFacts]) -> None:
    text = section(render(make_facts(2, chosen=21)), "Position on the Pareto front")
    assert "**Dominated on held-out data** by trial 12" in text


def test_what_the_data_cannot_tell_apart_is_said(facts: CardFacts) -> None:
    twin = replace(facts.parents[0], label="twin", held_out=facts.trial.held_out)
    text = section(render(replace(facts, parents=(twin,))), "Position on the Pareto front")
    assert "Against the parent twin it cannot be told apart in sentiment and question." in text


def test_only_a_difference_whose_interval_leaves_out_zero_is_bold(facts: CardFacts) -> None:
    twin = replace(
        facts.parents[0], label="twin", held_out={**facts.parents[0].held_out, "question": facts.trial.held_out["question"]}
    )
    text = section(render(replace(facts, parents=(twin,))), "Held-out scores")
    assert "| parent twin | **-0.068 [-0.100, -0.036]** | +0.000 [0.000, 0.000] |" in text


def test_without_intervals_gaps_are_told_by_value(facts: CardFacts) -> None:
    def bare(trial: Trial) -> Trial:
        return replace(trial, held_out={n: replace(s, replicates=None) for n, s in trial.held_out.items()})

    text = section(
        render(replace(facts, trial=bare(facts.trial), parents=tuple(map(bare, facts.parents)))), "Position on the Pareto front"
    )
    assert "Against the parent sentiment it gains 0.612 in question; gives up 0.068 in sentiment." in text


def test_a_published_trial_may_lie_behind_the_front(facts: CardFacts) -> None:
    assert facts.front is not None
    rest = replace(facts.front, trials=tuple(t for t in facts.front if t.number != facts.trial.number))
    assert "**Not on the front**" in render(replace(facts, front=rest)).text


def test_less_is_better_where_it_is_minimized(facts: CardFacts) -> None:
    assert facts.front is not None
    directions = {"sentiment": "minimize", "question": "maximize"}
    card = render(replace(facts, front=replace(facts.front, directions=directions)))
    assert "| sentiment ↓ accuracy |" in card.text
    assert "it gains 0.068 [0.036, 0.100] in sentiment and 0.612 [0.552, 0.672] in question." in card.text


def test_the_hypervolume_stands_with_its_reference_and_gains(facts: CardFacts) -> None:
    text = section(render(facts), "Held-out scores")
    assert "above the reference point sentiment 0.100 and question 0.100" in text
    assert "| all parents together |" in text
    assert "| the best parent alone, question |" in text
    assert "| uniform average |" in text


# Less than a front


def test_a_written_recipe_needs_no_front(written: CardFacts) -> None:
    card = render(written)
    assert "**not evaluated**" in card.text
    assert "Pareto" not in card.content
    assert "pareto-front" not in card.data.tags
    assert card.data.eval_results is None
    assert "None" not in card.text


def test_a_measured_merge_without_a_front_has_its_scores(facts: CardFacts) -> None:
    card = render(replace(facts, front=None, search=None))
    assert "## Held-out scores" in card.text
    assert "## Position" not in card.text
    assert len(card.data.eval_results) == 2


def test_a_front_without_held_out_scores_says_so(facts: CardFacts) -> None:
    assert facts.front is not None
    front = replace(facts.front, trials=tuple(replace(t, held_out={}) for t in facts.front))
    card = render(replace(facts, front=front, trial=replace(facts.trial, held_out={}), parents=(), others=()))
    assert "It has no held-out scores" in card.text
    assert "only on the data that the search looked at" in card.text
    assert card.data.eval_results is None


def test_local_models_are_named_in_the_body_alone(written: CardFacts, tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    recipe = written.recipe
    local = replace(recipe, models=(RecipeModel(ref=ModelRef(str(folder))), *recipe.models[1:]))
    card = render(replace(written, trial=replace(written.trial, recipe=local)))
    assert str(folder) not in str(card.data)
    assert "reads local folders that are not on the Hub: `my-model`" in card.text


def test_smoothed_search_rows_are_said_to_be_and_not_compared_with_held_out_ones(facts: CardFacts) -> None:
    first, *others = facts.objectives
    text = render(replace(facts, objectives=({**first, "smoothed": True}, *others))).content
    assert "| `search`, 300 rows, smoothed |" in text
    assert text.count("smoothed") == 1
    said = next(line for line in text.splitlines() if "looked better on search data" in line)
    assert first["name"] not in said
    assert others[0]["name"] in said


def test_only_the_name_of_a_local_dataset_is_shown(facts: CardFacts) -> None:
    objectives = tuple({**o, "dataset": "/home/me/private/rows.csv"} for o in facts.objectives)
    content = render(replace(facts, objectives=objectives)).content
    assert "/home/me" not in content
    assert "`rows.csv`" in content


# Licenses


def test_mixed_licenses_are_listed(facts: CardFacts) -> None:
    card = render(replace(facts, licenses={"demo/tiny-base": "mit", "demo/tiny-sentiment": "apache-2.0"}))
    assert (card.data.license, card.data.license_name) == ("other", "apache-2.0 and mit")
    assert "- `demo/tiny-base`: mit" in section(card, "License")


def test_an_unknown_license_is_left_out_with_a_note(facts: CardFacts) -> None:
    card = render(replace(facts, licenses={"demo/tiny-base": None}))
    assert card.data.license is None
    assert "Not every parent declares a license" in section(card, "License")


def test_a_restricted_license_needs_consent(facts: CardFacts) -> None:
    restricted = replace(facts, licenses={"demo/tiny-base": "cc-by-nc-4.0"})
    with pytest.raises(PublishError, match="consent"):
        render(restricted)
    assert render(replace(restricted, consent=True)).data.license == "cc-by-nc-4.0"


# Texts from outside

EVIL = (
    "a|b` <script>alert(1)</script> [x](http://evil.example) ![y](http://evil.example/z.png) **b** {{ 7*7 }} {% raw %} "
    "http://evil.example www.evil.example &lt;i&gt; </details>\n\n---\n# evil: !!python/object:os.system\n```\n| a | b |"
)


def poisoned(facts: CardFacts, text: str) -> CardFacts:
    """The same facts with the text wherever a text can come from outside."""
    assert facts.front is not None
    renamed = {name: f"{name}{text}" for name in facts.directions}

    def poison(trial: Trial) -> Trial:
        models = tuple(RecipeModel(ref=m.ref, name=f"{m.name}{text}", parameters=m.parameters) for m in trial.recipe.models)
        return replace(
            trial,
            label=f"{trial.label}{text}" if trial.label else "",
            recipe=replace(trial.recipe, models=models),
            scores={renamed[n]: s for n, s in trial.scores.items()},
            held_out={renamed[n]: s for n, s in trial.held_out.items()},
        )

    front = Front(
        trials=tuple(map(poison, facts.front)),
        directions={renamed[n]: d for n, d in facts.front.directions.items()},
        reference={renamed[n]: v for n, v in facts.front.reference.items()},
    )
    assert facts.search is not None
    return replace(
        facts,
        model_name=f"merge{text}",
        trial=poison(facts.trial),
        front=front,
        parents=tuple(map(poison, facts.parents)),
        others=tuple(map(poison, facts.others)),
        objectives=tuple(
            {k: f"{v}{text}" if isinstance(v, str) and k != "direction" else v for k, v in o.items()} for o in facts.objectives
        ),
        licenses={f"{model}{text}": f"{license}{text}" for model, license in facts.licenses.items()},
        search=replace(facts.search, sampler=f"NSGA{text}"),
        versions={**facts.versions, "other": f"1{text}"},
        languages=(f"en{text}",),
        pipeline_tag=f"text{text}",
    )


def shape(card: ModelCard) -> Iterator[tuple[str, ...]]:
    """The card's structure: blocks in order, and of each what is not text."""
    for token in tokens(card):
        inner = [child.type for child in token.children or () if child.type not in ("text", "code_inline")]
        yield (token.type, token.tag, *inner)


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_hostile_texts_change_nothing_of_the_structure(make_facts: Callable[..., CardFacts], objectives: int) -> None:
    facts = make_facts(objectives)
    assert list(shape(render(poisoned(facts, EVIL)))) == list(shape(render(poisoned(facts, " x"))))


def test_hostile_texts_appear_in_code_alone(facts: CardFacts) -> None:
    card = render(poisoned(facts, EVIL))
    texts = [c.content for t in tokens(card) for c in t.children or () if c.type != "code_inline"]
    assert not [text for text in texts if "evil" in text or "script" in text]


def test_hostile_texts_are_not_evaluated_as_templates(facts: CardFacts) -> None:
    assert "49" not in render(poisoned(replace(facts, parents=(), others=()), "{{ 7*7 }}")).text.replace("0.49", "")


def test_hostile_texts_survive_in_the_metadata_on_one_line(facts: CardFacts, tmp_path: Path) -> None:
    card = render(poisoned(facts, EVIL))
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.tags == ["merge", "hf_merge", "ties", "pareto-front"]
    assert data.model_name.startswith("merge" + EVIL[:20])
    assert "\n" not in data.model_name


# What a reader can run


def test_the_recipe_in_the_card_is_the_recipe(facts: CardFacts) -> None:
    fences = [token for token in tokens(render(facts)) if token.type == "fence" and token.info == "yaml"]
    assert recipe_yaml.loads(fences[0].content).digest == facts.recipe.digest


def test_the_command_names_the_recipe_and_quotes_the_folder(facts: CardFacts) -> None:
    text = section(render(replace(facts, model_name="my merge; rm -rf ~")), "Reproduce")
    assert "hf-merge merge recipe.yaml 'my merge; rm -rf ~'" in text


def save_tokenizer(folder: Path) -> None:
    words = ["[UNK]", "[PAD]", "A", "thin", "plot", "The", "capital", "of", "France", "is"]
    inner = Tokenizer(WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


def tiny(auto_class: str) -> Any:
    torch.manual_seed(0)
    if auto_class == "AutoModelForCausalLM":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=10, n_positions=64, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=1)
        )
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return BertForSequenceClassification(
        BertConfig(vocab_size=10, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}, **sizes)
    )


@pytest.mark.parametrize(
    ("auto_class", "expected"),
    [
        ("AutoModelForSequenceClassification", "good: 0."),
        ("AutoModelForCausalLM", "The capital of France is"),
        ("AutoModel", " parameters"),
    ],
)
def test_the_snippet_of_the_card_runs(facts: CardFacts, tmp_path: Path, auto_class: str, expected: str) -> None:
    tiny(auto_class).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    card = render(replace(facts, repo_id=str(tmp_path), auto_class=auto_class))
    snippet = next(token.content for token in tokens(card) if token.type == "fence" and token.info == "python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "card", "exec"), {})
    assert expected in printed.getvalue()


@pytest.mark.parametrize("auto_class", ["os.system", "AutoModel\nimport os", "", "Model"])
def test_a_class_that_is_none_is_refused(auto_class: str) -> None:
    with pytest.raises(PublishError, match="Auto classes"):
        usage("demo/x", auto_class)


def test_a_search_on_test_data_is_said(facts: CardFacts) -> None:
    first, *rest = facts.objectives
    tested = {**first, "split": "50% of test", "searched_on_test": True}
    content = render(replace(facts, objectives=(tested, *rest))).content
    assert f"**Searched on test data**: {first['name']} (`50% of test`)." in content


def test_a_search_on_other_data_says_nothing_of_test_data(facts: CardFacts) -> None:
    objectives = tuple({**objective, "searched_on_test": False} for objective in facts.objectives)
    assert render(replace(facts, objectives=objectives)).content == render(facts).content
