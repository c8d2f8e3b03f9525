"""Synthetic facts with fixed numbers: fine-tunes, a front of five trials, paired bootstrap replicates."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from huggingface_hub import HfApi, constants

from hf_merge.demo.hub.server import LocalHub
from hf_merge.model_ref import ModelRef
from hf_merge.publishing.facts import CardFacts, SearchFacts
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.scores import Score
from hf_merge.search.trial import Front, Trial

Shares = tuple[float, ...]

NAMES = ("sentiment", "question", "spam")
ROWS, REPLICATES = 250, 200
FRONT: dict[int, Shares] = {
    3: (0.93, 0.71, 0.88),
    8: (0.90, 0.80, 0.91),
    12: (0.87, 0.86, 0.93),
    21: (0.86, 0.84, 0.90),
    27: (0.80, 0.90, 0.95),
}
SEARCH: dict[int, Shares] = {
    3: (0.95, 0.74, 0.90),
    8: (0.92, 0.82, 0.92),
    12: (0.88, 0.87, 0.93),
    21: (0.87, 0.89, 0.94),
    27: (0.83, 0.92, 0.95),
}
PARENTS: dict[str, Shares] = {"sentiment": (0.94, 0.17, 0.51), "question": (0.52, 0.92, 0.49), "spam": (0.50, 0.20, 0.975)}
OTHERS: dict[str, Shares] = {"base": (0.49, 0.16, 0.50), "uniform average": (0.74, 0.66, 0.83)}


def ref(name: str) -> ModelRef:
    return ModelRef(f"demo/tiny-{name}", f"{len(name):x}" * 40)


def score(objective: int, share: float) -> Score:
    """About the given share of right rows. A better model is right wherever a worse one is, but for some noise."""
    # RandomState's streams never change, so neither does the golden card.
    rows = np.random.RandomState(objective)
    difficulty = rows.uniform(size=ROWS)
    resamples = rows.randint(0, ROWS, size=(REPLICATES, ROWS))
    noise = np.random.RandomState(round(share * 1000)).uniform(-0.04, 0.04, size=ROWS)
    outcomes = (difficulty + noise < share).astype(np.float32)
    replicates = outcomes[resamples].mean(1, dtype=np.float64)
    return Score(value=float(outcomes.mean(dtype=np.float64)), examples=ROWS, outcomes=outcomes, replicates=replicates)


def trial(number: int, held_out: Shares, search: Shares | None = None, label: str = "", objectives: int = 2) -> Trial:
    names = NAMES[:objectives]
    models = tuple(RecipeModel(ref=ref(n), parameters={"weight": round(w, 2)}) for n, w in zip(names, held_out, strict=False))
    recipe = Recipe(method="ties", models=models, base=ref("base"), seed=7, parameters={"density": 0.4 + number / 10000})
    return Trial(
        number=number,
        recipe=recipe,
        scores={n: Score(value=v, examples=300) for n, v in zip(names, search or held_out, strict=False)},
        held_out={n: score(k, v) for k, (n, v) in enumerate(zip(names, held_out, strict=False))},
        label=label,
    )


def synthetic_front(objectives: int = 2) -> Front:
    names = NAMES[:objectives]
    trials = tuple(trial(number, shares, SEARCH[number], objectives=objectives) for number, shares in FRONT.items())
    return Front(trials=trials, directions=dict.fromkeys(names, "maximize"), reference=dict.fromkeys(names, 0.1))


def synthetic_facts(objectives: int = 2, chosen: int = 12) -> CardFacts:
    names, front = NAMES[:objectives], synthetic_front(objectives)
    return CardFacts(
        repo_id="demo/tiny-merge",
        trial=next(t for t in front if t.number == chosen),
        licenses={ref(n).id: "apache-2.0" for n in ("base", *names)},
        front=front,
        parents=tuple(trial(1000 + k, PARENTS[n], label=n, objectives=objectives) for k, n in enumerate(names)),
        others=tuple(trial(2000 + k, shares, label=n, objectives=objectives) for k, (n, shares) in enumerate(OTHERS.items())),
        objectives=tuple(described(n) for n in names),
        search=SearchFacts(evaluated=32, failed=1, sampler="NSGA-II", seed=7, seconds=312.4),
        languages=("en",),
        pipeline_tag="text-classification",
        auto_class="AutoModelForSequenceClassification",
        versions={"hf_merge": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "optuna": "5.0.0"},
    )


def described(name: str) -> dict[str, object]:
    return {
        "name": name,
        "task": "text-classification",
        "metric": "accuracy",
        "implementation": "hf_merge accuracy",
        "direction": "maximize",
        "dataset": f"demo/{name}-texts",
        "split": "search",
        "held_out": "held_out",
        "rows_search": 300,
        "rows_held_out": ROWS,
    }


@pytest.fixture
def facts() -> CardFacts:
    """A merge of two models, chosen from a front over two objectives."""
    return synthetic_facts()


@pytest.fixture
def front() -> Front:
    """The front of `facts`."""
    return synthetic_front()


@pytest.fixture
def make_facts() -> Callable[..., CardFacts]:
    """Facts over a number of `objectives`, with the `chosen` trial."""
    return synthetic_facts


@pytest.fixture
def written() -> CardFacts:
    """A merge of a written recipe: nothing searched, nothing measured."""
    whole = synthetic_facts()
    return CardFacts(repo_id=whole.repo_id, trial=replace(whole.trial, scores={}, held_out={}), licenses=whole.licenses)


@pytest.fixture(autouse=True)
def _plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """A Hub of its own for each test."""
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def api(hub: LocalHub) -> HfApi:
    """The user demo."""
    return HfApi(endpoint=hub.endpoint, token="hf_local")


@pytest.fixture
def guest(hub: LocalHub) -> HfApi:
    """The user guest, who owns nothing of demo."""
    return HfApi(endpoint=hub.endpoint, token="hf_guest")


@pytest.fixture
def anonymous(hub: LocalHub) -> HfApi:
    """No token at all."""
    return HfApi(endpoint=hub.endpoint, token=False)
