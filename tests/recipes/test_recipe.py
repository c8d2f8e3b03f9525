import dataclasses
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_merge.errors import RecipeError
from hf_merge.methods import METHODS
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.recipes.yaml import dumps, from_dict, loads, to_dict


def recipe(**changes) -> Recipe:
    usual = {"method": "ties", "models": ("org/ada", "org/bob"), "base": "org/base", "parameters": {"density": 0.5}}
    return Recipe(**usual | changes)


def model(id_="org/ada", name="", **parameters) -> RecipeModel:
    return RecipeModel(ref=ModelRef.parse(id_), name=name, parameters=parameters)


@pytest.mark.parametrize("given", ["org/ada", ModelRef("org/ada"), model("org/ada")], ids=["text", "ref", "model"])
def test_models_may_be_given_as_text_refs_or_models(given):
    assert recipe(models=[given, "org/bob"]).models == (model("org/ada"), model("org/bob"))


def test_the_base_may_be_given_as_text():
    assert recipe(base="org/base@v1").base == ModelRef("org/base", "v1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "tise"},
            "Unknown merge method 'tise'. Did you mean 'ties'? Known: consensus, dare_linear, dare_ties, karcher",
        ),
        ({"method": ["ties"]}, "Unknown merge method ['ties']."),
        ({"models": ()}, "ties merges at least 1 models, got 0."),
        ({"method": "slerp", "parameters": {}, "models": ("a", "b", "c")}, "slerp merges exactly 2 models, got 3."),
        ({"method": "slerp", "parameters": {}, "models": ("a",)}, "slerp merges exactly 2 models, got 1."),
        ({"base": None}, "ties merges differences from a base model: give `base`."),
        ({"dtype": "bfloat61"}, "Unknown dtype 'bfloat61'. Did you mean 'bfloat16'? Known: bfloat16, float16, float32."),
        ({"seed": 1.5}, "`seed` is a whole number, got 1.5."),
        ({"seed": True}, "`seed` is a whole number, got True."),
        (
            {"parameters": {"desnity": 0.5}},
            "In the recipe's parameters: Unknown parameter of ties 'desnity'. Did you mean 'density'?",
        ),
        ({"parameters": {"weights": 0.5}}, "Unknown parameter of ties 'weights'. Did you mean 'weight'?"),
        ({"models": [model(desnity=0.5)]}, "In the parameters of 'ada': Unknown parameter of ties 'desnity'. Did you mean"),
        (
            {"models": [model(normalize=True)]},
            "In the parameters of 'ada': 'normalize' is one number for the whole merge; move it to the recipe's parameters.",
        ),
        ({"models": [model(scaling=2.0)]}, "'scaling' is one number for the whole merge; move it to the recipe's parameters."),
        ({"parameters": {"normalize": 1}}, "In the recipe's parameters: 'normalize' is true or false, got 1."),
        ({"parameters": {"density": "a lot"}}, "In the recipe's parameters: 'density' is a finite number, got 'a lot'."),
        ({"parameters": {"density": True}}, "'density' is a finite number, got True."),
        ({"parameters": {"weight": float("nan")}}, "'weight' is a finite number, got nan."),
        ({"parameters": {"weight": [0.5, 0.5]}}, "'weight' is a finite number, got [0.5, 0.5]."),
        ({"models": [model(weight=float("inf"))]}, "In the parameters of 'ada': 'weight' is a finite number, got inf."),
        ({"parameters": {"density": 1.5}}, "'density' lies between 0 and 1, got 1.5."),
        ({"models": [model(density=-0.1)]}, "In the parameters of 'ada': 'density' lies between 0 and 1, got -0.1."),
        ({"method": "slerp", "parameters": {"t": 2}}, "'t' lies between 0 and 1, got 2."),
        ({"method": "slerp", "parameters": {"weight": 2}}, "Unknown parameter of slerp 'weight'. Known: t."),
        ({"method": "linear", "parameters": {"scaling": 2}}, "Unknown parameter of linear 'scaling'."),
        (
            {"method": "linear", "parameters": {}, "models": [model("a", weight=1), model("b", weight=-1)]},
            "linear with `normalize` divides by the sum of the weights, and here that is 0.",
        ),
        ({"method": "linear", "parameters": {"weight": "much"}}, "'weight' is a finite number, got 'much'."),
        (
            {"method": "slerp", "parameters": {}, "base": "org/bob"},
            "slerp goes from the first model to the others: put the base org/bob first, or leave `base` out.",
        ),
        ({"models": ("org/ada", "no good")}, "'no good' is neither a local folder nor a Hub id."),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_said(changes, message):
    with pytest.raises(RecipeError) as caught:
        recipe(**changes)
    assert message in str(caught.value)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(RecipeError) as caught:
        recipe(base=None, dtype="int8", seed="x", parameters={"density": 2, "t": 0}, models=[model(weight="w")])
    assert len(str(caught.value).splitlines()) == 6


@pytest.mark.parametrize("total", [1e-12, 0.0])
def test_a_linear_sum_without_normalize_may_have_weights_that_add_up_to_nothing(total):
    models = [model("a", weight=1 + total), model("b", weight=-1)]
    Recipe(method="linear", models=models, parameters={"normalize": False})


def test_slerp_may_go_from_the_base():
    assert Recipe(method="slerp", models=("org/base", "org/ada"), base="org/base").primary == ModelRef("org/base")


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["org/ada", "org/bob"], ["ada", "bob"]),
        (["one/model", "two/model", "org/bob"], ["one/model", "two/model", "bob"]),
        (["org/ada@v1", "org/ada@v2"], ["org/ada@v1", "org/ada@v2"]),
        (["org/ada", "org/ada"], ["org/ada", "org/ada-2"]),
        (["gpt2", "gpt2"], ["gpt2", "gpt2-2"]),
        (["/one/model", "/two/model"], ["one/model", "two/model"]),
        ([model("org/ada", name="me"), model("org/bob", name="me")], ["org/ada", "org/bob"]),
        ([model("a/x", name="b/x"), "b/x", "c/x"], ["b/x", "b/x-2", "c/x"]),
        ([model("a", name="m"), model("b", name="m"), model("c", name="m-2")], ["a", "b", "m-2"]),
        (["org/ada", "org/ada", model("z/z", name="org/ada-2")], ["org/ada", "org/ada-3", "org/ada-2"]),
    ],
    ids=str,
)
def test_a_name_stands_for_one_model(models, names):
    assert [m.name for m in recipe(models=models).models] == names


@pytest.mark.parametrize("models", [("one/model", "two/model"), ("org/ada@v1", "org/ada@v2"), ("org/ada", "org/bob")], ids=str)
def test_a_models_name_does_not_depend_on_the_order(models):
    assert {m.ref: m.name for m in recipe(models=models).models} == {m.ref: m.name for m in recipe(models=models[::-1]).models}


def test_the_arguments_are_the_methods_with_lists_in_the_models_order():
    mixed = recipe(models=[model("org/ada", weight=0.25), model("org/bob", density=1)], parameters={"weight": 2, "scaling": 3})
    assert mixed.arguments() == {"weights": [0.25, 2.0], "density": [0.2, 1.0], "normalize": True, "scaling": 3.0}


@pytest.mark.parametrize("name", METHODS)
def test_the_arguments_are_what_the_method_takes(name):
    models = ("org/ada", "org/bob")
    arguments = Recipe(method=name, models=models, base="org/base").arguments()
    assert {"weight" if k == "weights" else k for k in arguments} == set(METHODS[name].parameters)


def test_inputs_are_read_once_with_the_base_first():
    assert recipe(models=("org/ada", "org/base", "org/ada")).inputs == (ModelRef("org/base"), ModelRef("org/ada"))


def test_the_first_model_is_primary_where_there_is_no_base():
    assert Recipe(method="linear", models=("org/ada", "org/bob")).primary == ModelRef("org/ada")


def test_pinning_sets_the_commit_of_every_model_and_keeps_names(tmp_path):
    mixed = recipe(models=("org/ada@main", tmp_path))
    commits = {ModelRef("org/ada", "main"): "aaa", ModelRef(str(tmp_path)): None, ModelRef("org/base"): "bbb"}
    pinned = mixed.pinned(commits)
    assert (pinned.base, pinned.models[0].ref) == (ModelRef("org/base", "bbb"), ModelRef("org/ada", "aaa"))
    assert pinned.models[1] == mixed.models[1]
    assert pinned.models[0].name == "ada"


def test_pinning_keeps_the_names_that_told_branches_apart():
    branches = recipe(models=("org/ada@v1", "org/ada@v2"))
    commits = {ref: f"commit{i}" for i, ref in enumerate(branches.inputs)}
    assert [m.name for m in branches.pinned(commits).models] == ["org/ada@v1", "org/ada@v2"]


def test_a_recipe_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe().seed = 1  # type: ignore[misc]


def test_the_given_parameters_are_copied():
    parameters = {"density": 0.5}
    made = recipe(parameters=parameters)
    parameters["density"] = 0.9
    assert made.arguments()["density"] == [0.5, 0.5]


def test_a_recipe_survives_pickling():
    assert pickle.loads(pickle.dumps(recipe())) == recipe()


def test_a_recipe_prints_readably():
    made = recipe(models=[model("org/ada", weight=0.3), "org/bob"], parameters={"density": 0.5, "scaling": 1.25})
    assert (
        str(made) == "TIES of ada (weight 0.3, density 0.5), bob (weight 1, density 0.5), normalize True, scaling 1.25 on base"
    )


def test_slerp_prints_without_numbers_of_models():
    assert str(Recipe(method="slerp", models=("org/ada", "org/bob"))) == "SLERP of ada, bob, t 0.5"


GOLDEN = {
    "ties": (recipe(), "8a4f1aef7b7d02cb"),
    "dare": (recipe(method="dare_linear", seed=3, dtype="bfloat16"), "e64c2c8f2e91e83c"),
    "slerp": (Recipe(method="slerp", models=("org/ada", "org/bob@v1")), "583aa1ac4b97e968"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_digest_is_golden(name):
    made, digest = GOLDEN[name]
    assert made.digest == digest


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": {"density": 0.5, "weight": 1}},
        {"parameters": {"density": 0.5, "scaling": 1, "normalize": True}},
        {"models": [model("org/ada", density=0.5), model("org/bob", density=0.5)], "parameters": {}},
        {"models": [ModelRef("org/ada"), model("org/bob")]},
        {"base": ModelRef("org/base")},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_the_digest_does_not_change_with_the_way_of_writing(changes, method):
    assert recipe(method=method, **changes).digest == recipe(method=method).digest


@pytest.mark.parametrize("name", ["scaling", "weight", "density"])
def test_a_whole_number_has_the_digest_of_its_float(name):
    assert recipe(parameters={name: 1}).digest == recipe(parameters={name: 1.0}).digest


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "dare_linear"},
        {"models": ("org/ada", "org/bob", "org/cyd")},
        {"models": ("org/ada", "org/bob@v1")},
        {"models": ("org/bob", "org/ada")},
        {"models": (model("org/ada", weight=0.5), "org/bob")},
        {"base": "org/other"},
        {"base": "org/base@v1"},
        {"parameters": {"density": 0.51}},
        {"parameters": {"density": 0.5, "scaling": 1.01}},
        {"parameters": {"density": 0.5, "normalize": False}},
        {"dtype": "float32"},
        {"seed": 1},
        {"models": (model("org/ada", name="me"), "org/bob")},
    ],
    ids=str,
)
def test_the_digest_changes_with_what_matters(changes):
    assert recipe(**{"method": "dare_ties"} | changes).digest != recipe(method="dare_ties").digest


@pytest.mark.parametrize("changes", [{"seed": 1}, {"models": (model("org/ada", name="me"), "org/bob")}], ids=str)
def test_what_keys_random_numbers_does_not_change_the_digest_of_a_method_without_any(changes):
    assert recipe(**changes).digest == recipe().digest


NAMES = st.from_regex(r"[a-z][a-z0-9.-]{0,6}[a-z0-9]", fullmatch=True).filter(lambda s: "--" not in s and ".." not in s)
REFS = st.builds(lambda o, n, r: ModelRef(f"{o}/{n}", r), NAMES, NAMES, st.none() | NAMES)
FINITE = st.floats(-4, 4).filter(lambda x: x == 0 or abs(x) > 1e-6)


@st.composite
def recipes(draw) -> Recipe:
    method = METHODS[draw(st.sampled_from(sorted(METHODS)))]

    def values(per_model):
        names = draw(st.sets(st.sampled_from(sorted(n for n, p in method.parameters.items() if p.per_model or not per_model))))
        kinds = {n: st.floats(0, 1) if n in ("density", "t") else FINITE for n in names}
        if method.name == "multislerp" and "weight" in names:
            kinds["weight"] = st.floats(0.5, 2)  # it divides by their sum
        return {n: draw(st.booleans() if n == "normalize" else kinds[n]) for n in names}

    least, most = method.models
    shareable = any(p.per_model for p in method.parameters.values())
    refs = draw(st.lists(REFS, min_size=least, max_size=most or 4))
    models = [
        RecipeModel(ref=ref, name=draw(st.just("") | NAMES), parameters=values(True) if shareable else {}) for ref in refs
    ]
    parameters = values(False)
    if method.name == "linear":
        parameters["normalize"] = False
    base = draw(REFS.filter(lambda b: b not in refs)) if method.space == "delta" else None
    dtype, seed = draw(st.sampled_from([None, "float32", "bfloat16"])), draw(st.integers(-5, 2**63))
    return Recipe(method=method.name, models=tuple(models), base=base, parameters=parameters, dtype=dtype, seed=seed)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(made=recipes())
def test_a_recipe_survives_the_mapping_and_the_text(made):
    for again in (from_dict(to_dict(made)), loads(dumps(made))):
        assert (again.digest, again.arguments(), again.inputs, again.dtype, again.seed) == (
            made.digest,
            made.arguments(),
            made.inputs,
            made.dtype,
            made.seed,
        )
        assert [m.name for m in again.models] == [m.name for m in made.models]
        assert to_dict(again) == to_dict(made)


def test_models_given_as_one_text_are_refused_and_not_read_letter_by_letter() -> None:
    with pytest.raises(RecipeError, match="list of models"):
        Recipe(method="linear", models="org/a")
