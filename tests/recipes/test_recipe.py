import dataclasses
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_merge.errors import RecipeError
from hf_merge.methods import METHODS
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.layer_map import LayerMap, LayerRange, Slice
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.recipes.tokenizer import TokenizerRequest
from hf_merge.recipes.yaml import dumps, from_dict, loads, to_dict


def recipe(**changes) -> Recipe:
    usual = {"method": "ties", "models": ("org/ada", "org/bob"), "base": "org/base", "parameters": {"density": 0.5}}
    return Recipe(**usual | changes)


def model(id_="org/ada", name="", **parameters) -> RecipeModel:
    return RecipeModel(ref=ModelRef.parse(id_), name=name, parameters=parameters)


def layers(*slices, **parameters) -> LayerMap:
    """Slices of (model, start, stop)."""
    return LayerMap(
        Slice(sources=tuple(LayerRange(model=m, start=a, stop=b) for m, a, b in sources), parameters=parameters)
        for sources in slices
    )


@pytest.mark.parametrize("given", ["org/ada", ModelRef("org/ada"), model("org/ada")], ids=["text", "ref", "model"])
def test_models_may_be_given_as_text_refs_or_models(given):
    assert recipe(models=[given, "org/bob"]).models == (model("org/ada"), model("org/bob"))


def test_the_base_may_be_given_as_text():
    assert recipe(base="org/base@v1").base == ModelRef("org/base", "v1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "tise"}, "Unknown merge method 'tise'. Did you mean 'ties'? Known: arcee_fusion, breadcrumbs"),
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
        ({"parameters": {"weight": [0.5, "x"]}}, "In the recipe's parameters: 'weight' is a finite number, got 'x'."),
        ({"parameters": {"weight": []}}, "In the recipe's parameters: 'weight' is an empty list."),
        ({"parameters": {"density": [{"filter": "mlp", "value": [0.5, 2]}]}}, "'density' lies between 0 and 1, got 2."),
        ({"parameters": {"normalize": [True, 1]}}, "'normalize' is true or false, got 1."),
        ({"parameters": {"density": [{"pattern": "mlp", "value": 1}]}}, "A value by tensor name is {filter: text, value:"),
        ({"private": "keep"}, "Unknown policy for `private` tensors 'keep'."),
        (
            {"layers": layers((("ada", 0, 2), ("cyd", 0, 2)))},
            "A slice takes layers of 'cyd', which is not a model of the recipe.",
        ),
        ({"layers": layers((("ada", 0, 2), ("bob", 0, 3)))}, "equally many layers, got ada [0, 2), bob [0, 3)."),
        (
            {"layers": layers((("ada", 2, 0),))},
            "Layers [2, 0) of 'ada': a range [start, stop) has whole numbers 0 <= start < stop.",
        ),
        ({"layers": layers((("ada", 0, 2),), lamda=2)}, "In the parameters of slice 1: Unknown parameter of ties 'lamda'."),
        (
            {"layers": LayerMap((Slice(sources=(LayerRange(model="ada", stop=1, parameters={"scaling": 1}),)),))},
            "In the parameters of 'ada' in slice 1: 'scaling' is one number for the whole merge",
        ),
        (
            {"tokenizer": TokenizerRequest(source=ModelRef("org/cyd"))},
            "The tokenizer takes tokens of org/cyd, which is not a model of the recipe.",
        ),
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
    expected = {"weights": [0.25, 2.0], "density": [0.2, 1.0], "normalize": True, "scaling": 3.0}
    assert {name: value for name, value in mixed.arguments().items() if name in expected} == expected


def test_a_gradient_runs_over_the_layers_and_is_its_first_number_elsewhere():
    mixed = recipe(models=[model("org/ada", weight=[0, 1]), "org/bob"])
    assert [mixed.arguments("x", depth)["weights"] for depth in (0.0, 0.25, 1.0)] == [[0, 1], [0.25, 1], [1, 1]]


def test_a_filter_that_does_not_match_leaves_the_number_to_the_next_level():
    own = model("org/ada", density=[{"filter": "mlp", "value": 0.7}])
    mixed = recipe(models=[own, "org/bob"], parameters={"density": [{"filter": "attn", "value": 0.4}]})
    found = {name: mixed.arguments(name)["density"] for name in ("mlp.w", "attn.w", "norm.w")}
    assert found == {"mlp.w": [0.7, 0.2], "attn.w": [0.4, 0.4], "norm.w": [0.2, 0.2]}


def test_per_model_filters_mean_the_tensors_names_in_the_models():
    mixed = recipe(parameters={"weight": [{"filter": "a", "value": 3}], "scaling": [{"filter": "out", "value": 2}]})
    found = mixed.arguments("out", sources=("a", "b"))
    assert (found["weights"], found["scaling"]) == ([3, 1], 2)


def test_a_sources_number_comes_before_its_models_the_slices_and_the_recipes():
    part = Slice(
        sources=(LayerRange(model="bob", stop=2, parameters={"weight": 5}), LayerRange(model="ada", stop=2)),
        parameters={"weight": 3, "scaling": 2},
    )
    mixed = recipe(
        models=[model("org/ada", density=0.9), model("org/bob", weight=4)],
        parameters={"density": 0.4, "weight": 1, "scaling": 1},
        layers=LayerMap((part,)),
    )
    found = mixed.arguments("x", 0.0, part)
    assert (found["weights"], found["density"], found["scaling"]) == ([5, 3], [0.4, 0.9], 2)


def test_the_models_of_slices_are_those_that_are_used_in_order_of_their_first_layers():
    mixed = recipe(models=("org/ada", "org/bob", "org/cyd"), layers=layers((("cyd", 0, 2),), (("ada", 0, 1), ("cyd", 1, 2))))
    assert [m.name for m in mixed.models] == ["cyd", "ada"]


def test_the_number_of_models_counts_in_each_slice():
    with pytest.raises(RecipeError, match="slerp merges exactly 2 models, got 1"):
        Recipe(method="slerp", models=("a", "b"), layers=layers((("a", 0, 2), ("b", 0, 2)), (("b", 2, 4),)))


@pytest.mark.parametrize("name", METHODS)
def test_the_arguments_are_what_the_method_takes(name):
    models = ("org/ada", "org/bob")[: METHODS[name].models[1]]
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
    assert str(made) == "TIES of ada (weight 0.3, density 0.5), bob (weight 1, density 0.5), scaling 1.25 on base"


def test_slerp_prints_without_numbers_of_models():
    assert str(Recipe(method="slerp", models=("org/ada", "org/bob"))) == "SLERP of ada, bob, t 0.5"


GOLDEN = {
    "ties": (recipe(), "a4e5715ee070ddd3"),
    "dare": (recipe(method="dare_linear", seed=3, dtype="bfloat16"), "0f2af4239e08726d"),
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


TENSORS = ("mlp", "self_attn.q_proj", "norm")


def number(method: str, name: str) -> st.SearchStrategy:
    default = METHODS[method].parameters[name].default
    if isinstance(default, bool):
        return st.booleans()
    if name in ("density", "t"):
        return st.floats(0, 1)
    return st.floats(0.5, 2) if name == "weight" else FINITE  # some methods divide by the weights' sum


def value(method: str, name: str) -> st.SearchStrategy:
    """A number, a gradient, or filters of them."""
    plain = number(method, name)
    either = plain | st.lists(plain, min_size=1, max_size=3)
    return either | st.lists(
        st.builds(lambda f, v: {"filter": f, "value": v} if f else {"value": v}, st.sampled_from(["", "*", *TENSORS]), either),
        min_size=1,
        max_size=3,
    )


@st.composite
def layer_maps(draw, method, names, base, values) -> LayerMap:
    least, most = method.models
    modules = draw(st.sampled_from([("",), ("text",), ("text", "vision")]))
    slices = []
    for module in draw(st.lists(st.sampled_from(modules), min_size=1, max_size=3)):
        count = draw(st.integers(least, max(least, min(most or 3, len(names)))))
        chosen = draw(st.permutations(names))[:count]
        start, length = draw(st.integers(0, 3)), draw(st.integers(1, 4) | st.just(None))
        if length is None:
            start = 0
        ranges = [LayerRange(model=n, start=start, stop=length and start + length, parameters=values(True)) for n in chosen]
        if base and draw(st.booleans()):
            first = 0 if length is None else draw(st.integers(0, 2))
            ranges.append(LayerRange(model="", start=first, stop=length and first + length))
        slices.append(Slice(sources=tuple(ranges), parameters=values(False), module=module))
    return LayerMap(tuple(slices))


@st.composite
def recipes(draw) -> Recipe:
    method = METHODS[draw(st.sampled_from(sorted(METHODS)))]

    def values(per_model):
        known = sorted(n for n, p in method.parameters.items() if p.per_model or not per_model)
        return {n: draw(value(method.name, n)) for n in known if draw(st.booleans())}

    least, most = method.models
    refs = draw(st.lists(REFS, min_size=least, max_size=most or 4))
    models = [RecipeModel(ref=ref, name=draw(st.just("") | NAMES), parameters=values(True)) for ref in refs]
    base = draw(REFS.filter(lambda b: b not in refs)) if method.space == "delta" else None
    if method.space == "any":
        base = draw(st.none() | REFS.filter(lambda b: b not in refs))
    if method.ordered:
        base = draw(st.sampled_from([None, refs[0]]))
    given = {"models": tuple(models), "base": base, "parameters": values(False)}
    names = [m.name for m in Recipe(method=method.name, **given | {"parameters": {}}).models]
    return Recipe(
        method=method.name,
        **given,
        layers=draw(st.none() | layer_maps(method, names, base and not method.ordered and base, values)),
        dtype=draw(st.sampled_from([None, "float32", "bfloat16"])),
        seed=draw(st.integers(-5, 2**63)),
        private=draw(st.sampled_from(["refuse", "owner"])),
        tokenizer=draw(st.sampled_from([None, TokenizerRequest(), TokenizerRequest(source=None, chat_template="chatml")])),
    )


def everything(made: Recipe) -> list:
    """What the recipe says of some tensors, slice by slice and module by module."""
    parts = sorted(made.layers.slices, key=lambda part: part.module) if made.layers else [None]
    return [made.arguments(tensor, depth, part) for part in parts for tensor in TENSORS for depth in (0.0, 0.3, 1.0)]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(made=recipes())
def test_a_recipe_survives_the_mapping_and_the_text(made):
    for again in (from_dict(to_dict(made)), loads(dumps(made))):
        assert everything(again) == everything(made)
        assert (again.inputs, again.dtype, again.seed, again.private) == (made.inputs, made.dtype, made.seed, made.private)
        assert (again.tokenizer, [m.name for m in again.models]) == (made.tokenizer, [m.name for m in made.models])
        assert to_dict(again) == to_dict(made)
        assert again.digest == made.digest


def test_models_given_as_one_text_are_refused_and_not_read_letter_by_letter() -> None:
    with pytest.raises(RecipeError, match="list of models"):
        Recipe(method="linear", models="org/a")
