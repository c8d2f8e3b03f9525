"""The model card of a merge: a pure function of its facts."""

import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_merge.errors import PublishError
from hf_merge.methods import METHODS
from hf_merge.model_ref import ModelRef
from hf_merge.publishing.facts import CardFacts
from hf_merge.publishing.license import OTHER, License, resolve
from hf_merge.publishing.markdown import Markdown, block, code, listed, one_line, plain, table
from hf_merge.publishing.position import complete, position
from hf_merge.publishing.sections import NONE, Sections, cell, duration
from hf_merge.recipes import yaml
from hf_merge.recipes.path import path_of
from hf_merge.version import __version__

HUB = "https://huggingface.co"
RECIPE_FILE = "recipe.yaml"

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    # What a template is given is escaped unless it is Markdown already, so that nothing can be forgotten.
    finalize=plain,
    autoescape=False,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)

_LOAD = 'model = {auto_class}.from_pretrained(repo_id, dtype="auto"{custom})\n'
_TOKENIZER = "tokenizer = AutoTokenizer.from_pretrained(repo_id)\n"
_COUNT = 'print(f"{model.num_parameters():,} parameters")\n'
_SNIPPETS = {
    "AutoModelForSequenceClassification": """\
        inputs = tokenizer("A thin plot, but the cast is wonderful.", return_tensors="pt")
        with torch.no_grad():
            probabilities = model(**inputs).logits[0].float().softmax(-1)
        for label in probabilities.argsort(descending=True)[:3].tolist():
            print(f"{model.config.id2label[label]}: {probabilities[label]:.3f}")
        """,
    "AutoModelForCausalLM": """\
        inputs = tokenizer("The capital of France is", return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=30)
        print(tokenizer.decode(output[0], skip_special_tokens=True))
        """,
    "AutoModelForSeq2SeqLM": """\
        inputs = tokenizer("Translate to German: The house is small.", return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=30)
        print(tokenizer.decode(output[0], skip_special_tokens=True))
        """,
}


def render(facts: CardFacts) -> ModelCard:
    """The card of a merge. Raises `PublishError` if the parents' licenses need the user's consent (see `license.resolve`)."""
    license = resolve(facts.licenses, consent=facts.consent)
    content = f"---\n{metadata(facts, license).to_yaml()}\n---\n\n{_body(facts, license)}"
    return ModelCard(content)


def metadata(facts: CardFacts, license: License) -> ModelCardData:
    """The card's front matter. Values are plain Python; results are of held-out data only."""
    results = list(_results(facts))
    metrics = sorted({result.metric_type for result in results})
    parents = [ref.id for ref in facts.recipe.inputs if not ref.is_local]
    front = ["pareto-front"] if facts.front else []
    named, on_hub = license.identifier == OTHER, re.fullmatch(r"[\w.-]+/[\w.-]+", facts.repo_id)
    return ModelCardData(
        language=[one_line(language) for language in facts.languages] or None,
        license=license.identifier,
        license_name=license.name if named else None,
        license_link=f"{HUB}/{facts.repo_id}#license" if named and license.name and on_hub else None,
        library_name="transformers",
        pipeline_tag=facts.pipeline_tag,
        base_model=parents or None,
        base_model_relation="merge" if parents else None,
        tags=["merge", "hf_merge", facts.recipe.method, *front],
        metrics=metrics or None,
        model_name=one_line(facts.name),
        eval_results=results or None,
    )


def usage(repo_id: str, auto_class: str, *, custom: bool = False) -> str:
    """Python that loads the model, whose code is its own if it is `custom`, and shows it at work, for the classes we know."""
    if not re.fullmatch(r"Auto[A-Za-z0-9]+", auto_class):
        raise PublishError(f"{auto_class!r} is not one of transformers' Auto classes, such as 'AutoModelForCausalLM'.")
    where = f"repo_id = {json.dumps(repo_id)}\n"
    load = _LOAD.format(auto_class=auto_class, custom=", trust_remote_code=True" if custom else "")
    snippet = dedent(_SNIPPETS.get(auto_class, ""))
    if not snippet:
        return f"from transformers import {auto_class}\n\n{where}{load}{_COUNT}"
    torch = "import torch\n" if "torch." in snippet else ""
    return f"{torch}from transformers import {auto_class}, AutoTokenizer\n\n{where}{_TOKENIZER}{load}\n{snippet}"


def _body(facts: CardFacts, license: License) -> str:
    sections, front, trial = Sections(facts), facts.front or None, facts.trial
    measured = bool(complete([trial], facts.directions)) and bool(facts.directions)
    compared = measured and complete(facts.rivals, facts.directions)
    local = [ref for ref in facts.recipe.inputs if ref.is_local]
    return _TEMPLATES.get_template("merge_card.md").render(
        name=facts.name,
        summary=_summary(facts),
        position=sections.position(front, position(trial, front, facts.rivals)) if front else [],
        picture=Markdown(facts.picture) if facts.picture and re.fullmatch(r"[\w.-]+", facts.picture) else None,
        held_out=sections.held_out() if trial.held_out else None,
        scored=bool(trial.scores),
        differences=sections.differences() if compared else None,
        doubts=sections.doubts(front) if front else [],
        hypervolumes=sections.hypervolumes(front) if front and complete(front, front.directions) else None,
        reference=sections.reference(front) if front else None,
        objectives=sections.objectives() if facts.objectives else None,
        tested=_tested(facts),
        search_scores=sections.search_scores(front) if front else None,
        importances=sections.importances() if facts.search and facts.search.importances else None,
        method=_method(facts),
        path=_path(facts),
        maps=_maps(facts),
        search=_search(facts),
        sources=_sources(facts),
        digest=code(facts.recipe.digest),
        recipe=block(yaml.dumps(facts.recipe), "yaml"),
        reproduce=block(_command(facts), "bash"),
        local=_local(local),
        usage=block(usage(facts.repo_id, facts.auto_class, custom=bool(facts.maps_before)), "python"),
        license=_license(license),
        versions=listed(f"{name} {version}" for name, version in facts.versions.items()) if facts.versions else None,
    )


def _summary(facts: CardFacts) -> Markdown:
    recipe = facts.recipe
    base = f" on the base {code(recipe.base.name)}" if recipe.base else ""
    merge = f"A {METHODS[recipe.method].title} merge of {listed(code(m.name) for m in recipe.models)}{base}"
    if not facts.front:
        return Markdown(f"{merge}, made from a written recipe.")
    found = f" that a search over {facts.search.evaluated} recipes found" if facts.search else ""
    place = f"one of {len(facts.front)} points of" if len(facts.front) > 1 else "the one point of"
    return Markdown(f"{merge}: {place} the Pareto front between {listed(facts.directions)}{found}.")


def _method(facts: CardFacts) -> Markdown:
    method = METHODS[facts.recipe.method]
    number = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", method.paper)
    paper = f"[{method.paper}](https://arxiv.org/abs/{number[1]})" if number else plain(method.paper)
    said = f"**{method.title}** ({paper})." if method.paper else f"**{method.title}**."
    if facts.added is not None:
        hm3 = "[arXiv:2409.18893](https://arxiv.org/abs/2409.18893)"
        what = "is a path through layers" if facts.recipe.layers else "is a merge of whole models, not a path through layers"
        said += f" Searched in two steps (HM3, {hm3}): merges first, then paths through layers. This model {what}."
        added = cell(facts.added, abs(facts.added.value) or 1.0, sign=True)
        verdict = "" if facts.added.clear else ", which held-out data cannot tell from nothing"
        said += f" The paths added {added} to the held-out hypervolume of the merges{verdict}."
    return Markdown(said)


def _path(facts: CardFacts) -> Markdown | None:
    """Which model's which layer stands where: a row for each model, a column for each layer of the result."""
    layers = facts.recipe.layers
    if layers is None or any(part.module or part.sources[0].length is None for part in layers.slices):
        return None
    path = path_of(layers)
    models = list(dict.fromkeys(step.model for step in path))
    names = {model: one_line(model) or "base" for model in models}
    wide, width = max(map(len, [*names.values(), "position"])), len(str(max(len(path), *(step.layer for step in path)))) + 2
    rows = [f"{'position':<{wide}}" + "".join(f"{i:>{width}}" for i in range(len(path)))]
    for model in models:
        cells = (f"{step.layer if step.model == model else '':>{width}}" for step in path)
        rows.append(f"{names[model]:<{wide}}{''.join(cells)}".rstrip())
    scaled = [f"×{step.scale:g} before position {i}" for i, step in enumerate(path) if step.scale != 1.0]
    return block("\n".join(rows + scaled), "text")


def _maps(facts: CardFacts) -> Markdown | None:
    if not facts.maps_before:
        return None
    places = listed(Markdown(str(place)) for place in facts.maps_before)
    return Markdown(
        f"The stream is mapped before position {places}, by the Python code in this repository: transformers loads it with "
        "`trust_remote_code=True` alone. The recipe has the layers without these maps."
    )


def _search(facts: CardFacts) -> Markdown | None:
    if (search := facts.search) is None:
        return None
    failed = f" ({search.failed} failed)" if search.failed else ""
    trials = f"{search.evaluated} trials{failed}, {duration(search.seconds)}"
    found = f"Found by {plain(search.sampler)} with seed {search.seed} in {trials}."
    if search.constraints:
        kept = listed(code(f"{name} {bound}") for name, bound in search.constraints.items())
        found += f" On search data every point of the front keeps {kept}."
    return Markdown(found)


def _tested(facts: CardFacts) -> Markdown | None:
    known = [facts.objective(name) for name in facts.directions]
    names = [f"{plain(o['name'])} ({code(o.get('split') or o['name'])})" for o in known if o.get("searched_on_test")]
    if not names:
        return None
    return Markdown(
        f"**Searched on test data**: {listed(map(Markdown, names))}. The recipe was chosen by answers to rows of a test set, "
        "so scores on that test set flatter it and compare with nobody's; only the held-out rows were kept from the search."
    )


def _sources(facts: CardFacts) -> Markdown:
    licenses = resolve(facts.licenses, consent=True).members
    names = {m.ref: m.name for m in facts.recipe.models}
    rows = []
    for ref in facts.recipe.inputs:
        where = code(f"{ref.name} (local folder)") if ref.is_local else Markdown(f"[{code(ref.id)}]({HUB}/{ref.id})")
        commit = NONE if ref.is_local else code(ref.revision) if ref.revision else Markdown("not pinned")
        role = Markdown("base" if ref == facts.recipe.base and ref not in names else "model")
        declared = licenses.get(ref.id, ())
        rows.append([role, where, commit, listed(declared) if declared else Markdown("unknown")])
    return table(["role", "model", "commit", "license"], rows, words=4)


def _command(facts: CardFacts) -> str:
    return f"pip install hf_merge=={facts.versions.get('hf_merge', __version__)}\nhf-merge merge {RECIPE_FILE} {_folder(facts)}"


def _folder(facts: CardFacts) -> str:
    return shlex.quote(one_line(facts.name)) if re.match(r"\w", facts.name) else "merged"


def _local(refs: list[ModelRef]) -> Markdown | None:
    if not refs:
        return None
    return Markdown(f"The recipe reads local folders that are not on the Hub: {listed(code(ref.name) for ref in refs)}.")


def _license(license: License) -> Markdown:
    declared = plain(license.name or license.identifier) if license.identifier else None
    members = [f"{code(parent)}: {listed(found) if found else 'unknown'}" for parent, found in license.members.items()]
    listing = "\n".join(f"- {line}" for line in (*members, *license.duties))
    return Markdown(f"{f'**{declared}**. ' if declared else ''}{license.note}\n\n{listing}".rstrip())


def _results(facts: CardFacts) -> Iterator[EvalResult]:
    for name in facts.directions:
        known, score = facts.objective(name), facts.trial.held_out.get(name)
        if score is None or not math.isfinite(score.value) or not (known.get("dataset") and known.get("metric")):
            continue
        yield EvalResult(
            task_type=one_line(known.get("task") or facts.pipeline_tag or "other"),
            task_name=one_line(name),
            dataset_type=one_line(known["dataset"]),
            dataset_name=one_line(known["dataset"]),
            dataset_split=one_line(known["held_out"]) if known.get("held_out") else None,
            metric_type=one_line(known["metric"]),
            # Results of one dataset share an entry with one task name: only the metric's name can say the objective.
            metric_name=f"{one_line(name)}: {one_line(known['metric'])} (held out)",
            metric_value=round(float(score.value), 6),
        )
