from pathlib import Path

import pytest

from hf_merge.errors import RecipeError
from hf_merge.methods import METHODS
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.mergekit import DEFAULTS
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.recipes.tokenizer import TokenizerRequest, TokenRow
from hf_merge.recipes.yaml import dumps, from_dict, load, load_mapping, loads, to_dict

GOLDEN = Path(__file__).parent / "golden.yaml"

LINEAR = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight: 1.0
  - model: WizardLM/WizardLM-13B-V1.2
    parameters:
      weight: 0.3
merge_method: linear
dtype: float16
"""
TIES = """
models:
  - model: mistralai/Mistral-7B-v0.1
    # no parameters necessary for base model
  - model: OpenPipe/mistral-ft-optimized-1218
    parameters:
      density: 0.5
      weight: 0.5
  - model: mlabonne/NeuralHermes-2.5-Mistral-7B
    parameters:
      density: 0.5
      weight: 0.3
merge_method: ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
SLERP = """
models:
  - model: mlabonne/NeuralHermes-2.5-Mistral-7B
  - model: OpenPipe/mistral-ft-optimized-1218
merge_method: slerp
base_model: OpenPipe/mistral-ft-optimized-1218
parameters:
  t: 0.25
dtype: bfloat16
"""


MERGE = {"merge_method": "ties", "base_model": "org/base", "models": ["org/ada"]}


def golden_recipe() -> Recipe:
    return Recipe(
        method="dare_ties",
        models=(
            RecipeModel(ref=ModelRef("org/ada"), parameters={"weight": 0.3}),
            RecipeModel(ref=ModelRef("org/bob", "main"), name="Bøb", parameters={"density": 1e-5}),
        ),
        base=ModelRef("org/base", "v1"),
        parameters={"density": 0.5, "normalize": False, "scaling": 1.25},
        dtype="bfloat16",
        seed=3,
    )


def usual(**changes):
    content = {"merge_method": "ties", "base_model": "org/base", "models": [{"model": "org/ada"}, {"model": "org/bob"}]}
    return {k: v for k, v in (content | changes).items() if v is not None}


def sliced(slices):
    return {"models": None, "slices": slices}


def test_a_recipe_is_written_as_the_golden_file():
    assert dumps(golden_recipe()) == GOLDEN.read_text(encoding="utf-8")


def test_the_golden_file_is_read_as_the_recipe():
    assert load(GOLDEN).digest == golden_recipe().digest


def test_a_slerp_without_a_base_is_written_with_the_one_that_mergekit_needs():
    slerp = Recipe(method="slerp", models=("org/ada", "org/bob"))
    assert to_dict(slerp) == {
        "merge_method": "slerp",
        "base_model": "org/ada",
        "models": [{"model": "org/ada", "name": "ada"}, {"model": "org/bob", "name": "bob"}],
        "parameters": {"t": 0.5},
        "seed": 0,
    }


def test_mergekits_linear_is_understood():
    made = loads(LINEAR)
    assert [str(m.ref) for m in made.models] == ["psmathur/orca_mini_v3_13b", "WizardLM/WizardLM-13B-V1.2"]
    assert (made.method, made.arguments(), made.dtype) == ("linear", {"weights": [1.0, 0.3], "normalize": True}, "float16")


def test_mergekits_ties_is_understood_and_its_base_has_no_delta():
    made = loads(TIES)
    assert [m.name for m in made.models] == ["mistral-ft-optimized-1218", "NeuralHermes-2.5-Mistral-7B"]
    assert made.base == ModelRef("mistralai/Mistral-7B-v0.1")
    assert (made.arguments()["weights"], made.arguments()["density"]) == ([0.5, 0.3], [0.5, 0.5])


def test_mergekits_slerp_starts_from_its_base():
    made = loads(SLERP)
    assert [m.name for m in made.models] == ["mistral-ft-optimized-1218", "NeuralHermes-2.5-Mistral-7B"]
    assert made.arguments() == {"t": 0.25}


def test_mergekits_slerp_may_leave_the_base_out_of_the_models():
    made = from_dict(usual(merge_method="slerp", models=["org/ada"]))
    assert [m.name for m in made.models] == ["base", "ada"]


def test_slerp_of_two_models_may_have_another_base_for_its_config():
    made = from_dict(usual(merge_method="slerp"))
    assert ([m.name for m in made.models], made.primary) == (["ada", "bob"], ModelRef("org/base"))


def test_mergekits_lambda_is_scaling():
    assert from_dict(usual(parameters={"lambda": 0.7})).arguments()["scaling"] == 0.7


@pytest.mark.parametrize("method", DEFAULTS)
def test_a_missing_number_is_mergekits_default(method):
    models = ["org/ada", "org/bob"][: METHODS[method].models[1]]
    arguments = from_dict(usual(merge_method=method, models=models)).arguments()
    found = {name: arguments[name] for name in DEFAULTS[method]}
    expected = {
        name: [value] * len(models) if isinstance(found[name], list) else value for name, value in DEFAULTS[method].items()
    }
    assert found == expected


def test_a_missing_number_of_a_recipe_in_python_is_our_default():
    assert Recipe(method="ties", models=("a", "b"), base="c").arguments()["density"] == [0.2, 0.2]


def test_where_no_filter_matches_a_number_is_mergekits_default():
    made = from_dict(usual(parameters={"density": [{"filter": "mlp", "value": 0.5}]}))
    assert (made.arguments("mlp")["density"], made.arguments("attn")["density"]) == ([0.5, 0.5], [1, 1])


@pytest.mark.parametrize(("rescale", "expected"), [({}, (True, True)), ({"rescale": False}, (False, False))], ids=str)
def test_mergekits_rescale_of_dare_keeps_the_l1_norm(rescale, expected):
    arguments = from_dict(usual(merge_method="dare_ties", parameters=rescale)).arguments()
    assert (arguments["rescale"], arguments["match_l1"]) == expected


def test_mergekits_rescale_of_ties_keeps_the_l1_norm():
    made = from_dict(usual(parameters={"rescale": True}))
    assert (made.arguments()["match_l1"], to_dict(made)["parameters"]["rescale"]) == (True, True)


@pytest.mark.parametrize(
    ("changes", "ignored"),
    [
        ({"parameters": {"int8_mask": True}}, {}),
        (
            {"merge_method": "task_arithmetic", "parameters": {"density": 0.5, "rescale": True}},
            {"merge_method": "task_arithmetic"},
        ),
        (
            {"models": [{"model": {"model": "org/ada", "override_architecture": "LlamaForCausalLM"}}, "org/bob"]},
            {"models": ["org/ada", "org/bob"]},
        ),
        ({"models": ["org/base", "org/ada", "org/bob"]}, {}),
        ({"models": [{"model": "org/base", "parameters": {"weight": 2}}, "org/ada", "org/bob"]}, {}),
        ({"dtype": "torch.float16"}, {"dtype": "float16"}),
        ({"dtype": "float32", "out_dtype": "float16"}, {"dtype": "float16"}),
        ({"tokenizer_source": None, "slices": None, "modules": None}, {}),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_has_no_effect_makes_the_same_recipe(changes, ignored):
    assert from_dict(usual() | changes).digest == from_dict(usual() | ignored).digest


SLICES = """
merge_method: slerp
base_model: org/ada
slices:
  - sources:
      - {model: org/bob, layer_range: [0, 8]}
      - {model: org/ada, layer_range: [4, 12]}
    parameters:
      t: [{filter: mlp, value: [0, 1]}]
    residual_weight: 0.1
  - base_model: org/bob
    sources:
      - {model: org/ada, layer_range: [8, 16]}
      - {model: org/bob, layer_range: [8, 16]}
parameters:
  t: 0.3
"""


def test_slices_are_read_with_the_base_first():
    made = loads(SLICES)
    ranges = [[(s.model, s.start, s.stop) for s in part.sources] for part in made.layers.slices]
    assert ranges == [[("ada", 4, 12), ("bob", 0, 8)], [("bob", 8, 16), ("ada", 8, 16)]]
    assert (made.base, [m.name for m in made.models]) == (ModelRef("org/ada"), ["ada", "bob"])


@pytest.mark.parametrize(("slice_", "tensor", "t"), [(0, "mlp", 0.5), (0, "attn", 0.3), (1, "mlp", 0.3)])
def test_a_slices_numbers_come_first(slice_, tensor, t):
    made = loads(SLICES)
    assert made.arguments(tensor, 0.5, made.layers.slices[slice_]) == {"t": t}


def test_slices_are_written_as_mergekit_has_them():
    written = to_dict(loads(SLICES))
    assert written["slices"] == [
        {
            "sources": [
                {"model": "org/ada", "layer_range": [4, 12], "name": "ada"},
                {"model": "org/bob", "layer_range": [0, 8], "name": "bob"},
            ],
            "parameters": {"t": [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.3}]},
        },
        {
            "sources": [
                {"model": "org/bob", "layer_range": [8, 16], "name": "bob"},
                {"model": "org/ada", "layer_range": [8, 16], "name": "ada"},
            ],
            "base_model": "org/bob",
            "parameters": {"t": 0.3},
        },
    ]


def test_a_source_that_is_the_base_of_deltas_says_where_its_layers_are():
    sources = [{"model": "org/base", "layer_range": [0, 2]}, {"model": "org/ada", "layer_range": [2, 4]}]
    made = from_dict(usual(models=None, slices=[{"sources": sources}]))
    assert [(s.model, s.start) for s in made.layers.slices[0].sources] == [("", 0), ("ada", 2)]


def test_the_base_of_deltas_is_written_among_the_sources_where_mergekit_wants_it():
    made = from_dict(usual(models=None, slices=[{"sources": [{"model": "org/ada", "layer_range": [2, 4]}]}]))
    sources = to_dict(made)["slices"][0]["sources"]
    assert [(s["model"], s["layer_range"]) for s in sources] == [("org/base", [2, 4]), ("org/ada", [2, 4])]


def test_slices_may_say_what_the_base_is():
    slices = [{"base_model": "org/base", "sources": [{"model": "org/ada", "layer_range": [0, 2]}]}]
    assert from_dict({"merge_method": "ties", "slices": slices}).base == ModelRef("org/base")


MODULES = """
merge_method: linear
modules:
  text_decoder:
    slices:
      - sources:
          - {model: org/ada, layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: 0.1}]}}
          - {model: org/bob, layer_range: [0, 2]}
    parameters:
      weight: [{filter: attn, value: 0.2}]
  vision_tower:
    models:
      - model: org/bob
parameters:
  weight: 0.3
"""


def test_modules_are_slices_of_their_own():
    made = loads(MODULES)
    found = [(part.module, [(s.model, s.start, s.stop) for s in part.sources]) for part in made.layers.slices]
    assert found == [("text_decoder", [("ada", 0, 2), ("bob", 0, 2)]), ("vision_tower", [("bob", 0, None)])]


@pytest.mark.parametrize(("tensor", "weights"), [("mlp", [0.1, 0.3]), ("attn", [0.2, 0.2]), ("norm", [0.3, 0.3])])
def test_a_modules_numbers_stand_between_its_slices_and_the_recipes(tensor, weights):
    made = loads(MODULES)
    assert made.arguments(tensor, 0.0, made.layers.slices[0])["weights"] == weights


def test_a_module_of_whole_models_is_written_as_models():
    assert to_dict(loads(MODULES))["modules"]["vision_tower"] == {
        "models": [{"model": "org/bob", "name": "bob", "parameters": {"weight": 0.3}}]
    }


def test_gradients_and_filters_are_written_with_every_number():
    models = [{"model": "org/ada", "parameters": {"weight": [0, 0.5, 1]}}, "org/bob"]
    made = from_dict(usual(models=models, parameters={"density": [{"filter": "mlp", "value": "1e-1"}]}))
    assert [m["parameters"]["weight"] for m in to_dict(made)["models"]] == [[0.0, 0.5, 1.0], 1.0]
    assert to_dict(made)["models"][0]["parameters"]["density"] == [{"filter": "mlp", "value": 0.1}, {"value": 1.0}]


def test_the_tokenizer_is_read_and_written():
    block = {"tokenizer": {"source": "union", "tokens": {"<x>": {"source": "org/ada"}}}, "chat_template": "chatml"}
    made = from_dict(usual() | block)
    assert made.tokenizer == TokenizerRequest(tokens={"<x>": TokenRow(model=ModelRef("org/ada"))}, chat_template="chatml")
    assert {key: to_dict(made)[key] for key in block} == block


def test_what_is_ours_is_read_and_written():
    made = from_dict(usual(private="owner", seed=3))
    assert (made.private, made.seed, to_dict(made)["private"], to_dict(made)["seed"]) == ("owner", 3, "owner", 3)


def test_the_same_model_with_two_adapters_is_two_models():
    slices = [{"sources": [{"model": f"org/ada+org/{a}", "layer_range": [0, 2]} for a in ("x", "y")]}]
    assert [m.name for m in from_dict({"merge_method": "linear", "slices": slices}).models] == ["x", "y"]


@pytest.mark.parametrize(
    "entry",
    [
        "org/ada@v1",
        {"model": "org/ada@v1"},
        {"model": {"path": "org/ada", "revision": "v1"}},
        {"model": {"model": {"path": "org/ada", "revision": "v1"}, "lora": None}},
    ],
    ids=str,
)
def test_a_model_may_be_text_or_mergekits_mapping(entry):
    assert from_dict(usual(models=[entry])).models[0].ref == ModelRef("org/ada", "v1")


def test_a_models_name_is_read():
    assert from_dict(usual(models=[{"model": "org/ada", "name": "first"}])).models[0].name == "first"


def test_a_folder_with_a_plus_in_its_name_is_no_adapter(tmp_path):
    folder = tmp_path / "a+b"
    folder.mkdir()
    assert from_dict(usual(models=[str(folder)])).models[0].ref == ModelRef(str(folder))


@pytest.mark.parametrize(
    "entry",
    [
        "org/ada@v1+org/lora@v2",
        {"model": "org/ada@v1+org/lora@v2"},
        {"model": {"model": "org/ada@v1", "lora": "org/lora@v2"}},
        {"model": {"model": {"path": "org/ada", "revision": "v1"}, "lora": {"path": "org/lora", "revision": "v2"}}},
    ],
    ids=str,
)
def test_a_model_may_have_an_adapter(entry):
    assert from_dict(usual(models=[entry])).models[0].ref == ModelRef("org/ada", "v1", ModelRef("org/lora", "v2"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gate_mode": "hidden", "experts": []}, "'gate_mode' in a recipe belongs to mergekit-moe"),
        ({"genome": {}, "tasks": []}, "'genome' in a recipe belongs to mergekit-evolve, a search: search with `auto_merge`"),
        ({"name": "first"} | MERGE, "'name' in a recipe belongs to mergekit-multi"),
        ({"out_path": "first"} | MERGE, "'out_path' in a recipe belongs to mergekit-multi"),
        ({"allow_crimes": True} | MERGE, "'allow_crimes' in a recipe is an option of mergekit's command line"),
        ({"random_seed": 1} | MERGE, "the recipe's key is 'seed'"),
        (MERGE | {"models": ["./a/model.safetensors"]}, "is one file, which mergekit-pytorch merges. Give the folder"),
        (MERGE | {"dtype": "float64"}, "'dtype' is float32 or bfloat16 or float16, got 'float64': everything is computed in"),
        (MERGE | {"out_dtype": "int64"}, "'out_dtype' is float32 or bfloat16 or float16, got 'int64'"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_belongs_to_another_of_mergekits_tools_is_refused_by_name(content, message):
    with pytest.raises(RecipeError) as caught:
        from_dict(content)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {"t": [0, 0.5, 1]}}, "In the recipe's parameters: Unknown parameter of ties 't'."),
        ({"parameters": {"densty": 1}}, "Unknown parameter of ties 'densty'. Did you mean 'density'?"),
        ({"merge_method": "model_stock", "parameters": {"weight": 1}}, "Unknown parameter of model_stock 'weight'."),
        (
            {"models": [{"model": "org/ada", "parameters": {"weight": [{"pattern": "mlp", "value": 0.5}]}}]},
            "'weight' of org/ada: A value by tensor name is {filter: text, value: number or gradient}, got {'pattern': 'mlp'",
        ),
        (
            {"parameters": {"weight": {"filter": "mlp"}}},
            "'weight' of the recipe: A value by tensor name is {filter: text, value",
        ),
        (
            {"parameters": {"weight": [{"filter": 3, "value": 1}]}},
            "A filter is a part of tensor names such as 'self_attn', got 3.",
        ),
        ({"models": [{"model": {"model": "a", "lora": 7}}]}, "or a path, got 7."),
        ({"base_model": {"path": "a", "adapter": "b"}}, "Unknown key in a model's reference: 'adapter'."),
        ({"models": [{"model": "org/ada", "lora": "org/x"}]}, "It belongs in a model's reference."),
        (
            {"models": [{"model": "org/ada", "parameters": {"lambda": 2}}]},
            "In the parameters of org/ada: 'lambda' is one number for",
        ),
        (
            {"merge_method": "slerp", "models": [{"model": "a", "parameters": {"t": 0.5}}]},
            "In the parameters of a: 't' is one number",
        ),
        ({"normalize": True}, "Unknown key in a recipe: 'normalize'."),
        ({"normalize": True}, "It belongs in 'parameters'."),
        ({"dtyp": "float16"}, "Unknown key in a recipe: 'dtyp'. Did you mean 'dtype'?"),
        ({"dtype": "float61"}, "Unknown dtype 'float61'. Did you mean 'float16'?"),
        ({"layer_range": [0, 2]}, "It belongs in a slice's source."),
        ({"residual_weight": 1}, "It belongs in a slice."),
        ({"slices": [1]}, "A recipe needs exactly one of 'models', 'slices' and 'modules', got models and slices."),
        (sliced([1]), "A slice is a mapping with 'sources', got 1."),
        (sliced([{"source": []}]), "A slice is a mapping with 'sources', got {'source': []}."),
        (sliced([{"sources": []}]), "'sources' is a list with something in it, got []."),
        (sliced([{"sources": ["org/ada"]}]), "A slice's source is a mapping with 'model', got 'org/ada'."),
        (sliced([{"sources": [{"model": "a"}]}]), "a in slice 1 needs 'layer_range': [start, stop], got None."),
        (
            sliced([{"sources": [{"model": "a", "layer_range": [1]}]}]),
            "a in slice 1 needs 'layer_range': [start, stop], got [1].",
        ),
        (
            sliced([{"sources": [{"model": "a", "layer_range": [3, 1]}]}]),
            "Layers [3, 1) of 'a': a range [start, stop) has whole",
        ),
        (
            sliced([{"sources": [{"model": "a", "layer_range": ["x", 1]}]}]),
            "Layers [x, 1) of 'a': a range [start, stop) has whole",
        ),
        (
            sliced([{"sources": [{"model": "a", "layer_range": [0, 2], "weight": 1}]}]),
            "Unknown key in a slice's source: 'weight'.",
        ),
        (
            sliced([{"sources": [{"model": "a", "layer_range": [0, 2], "parameters": {"normalize": True}}]}]),
            "In the parameters of a in slice 1: 'normalize' is one number for the whole merge",
        ),
        (
            sliced([{"base_model": "x", "sources": [{"model": "a", "layer_range": [0, 2]}]}]),
            "ties has one base in all slices, got org/base, x.",
        ),
        ({"models": None, "modules": ["x"]}, "'modules' is a mapping of names to modules, got list."),
        ({"models": None, "modules": {"x": 1}}, "Module 'x' is a mapping with 'models' or 'slices', got 1."),
        ({"models": None, "modules": {"x": {"parameters": {}}}}, "Module 'x' needs exactly one of 'models' and 'slices'."),
        ({"models": None, "modules": {"x": {"model": "a"}}}, "Unknown key in a module: 'model'. Did you mean 'models'?"),
        ({"tokenizer_source": "onion"}, "The tokenizer takes tokens of onion, which is not a model of the recipe."),
        ({"tokenizer": {"sauce": "union"}}, "Unknown key in 'tokenizer': 'sauce'."),
        ({"merge_method": "tise"}, "Unknown merge method 'tise'. Did you mean 'ties'?"),
        ({"merge_method": ["ties"]}, "Unknown merge method ['ties']."),
        ({"merge_method": None}, "A recipe needs 'merge_method'."),
        ({"models": None}, "A recipe needs exactly one of 'models', 'slices' and 'modules'."),
        ({"models": "org/ada"}, "'models' is a list with something in it, got 'org/ada'."),
        ({"models": [{"name": "ada"}]}, "A model's entry is a mapping with 'model', got {'name': 'ada'}."),
        ({"models": [None]}, "A model is 'namespace/name', 'namespace/name@revision' or a path, got None."),
        ({"models": [{"model": None}]}, "or a path, got None."),
        ({"models": [{"model": 7}]}, "or a path, got 7."),
        ({"models": [{"model": {"revision": "v1"}}]}, "A model's reference needs 'path' (and 'revision'), or 'model'"),
        (
            {"models": [{"model": {"path": "a", "revison": "v1"}}]},
            "Unknown key in a model's reference: 'revison'. Did you mean 'revision'?",
        ),
        ({"models": ["no good"]}, "'no good' is neither a local folder nor a Hub id."),
        ({"merge_metod": "ties"}, "Unknown key in a recipe: 'merge_metod'. Did you mean 'merge_method'?"),
        ({"method": "ties"}, "Unknown key in a recipe: 'method'. Did you mean 'merge_method'?"),
        ({"model": "org/ada"}, "It belongs in a model's entry or a slice's source"),
        ({"density": 0.5}, "Unknown key in a recipe: 'density'."),
        ({"density": 0.5}, "It belongs in 'parameters'."),
        ({"lambda": 0.5}, "It belongs in 'parameters'."),
        ({"models": [{"model": "org/ada", "weight": 0.5}]}, "Unknown key in a model's entry: 'weight'."),
        ({"models": [{"model": "org/ada", "weight": 0.5}]}, "It belongs in 'parameters'."),
        ({"models": [{"model": "org/ada", "dtype": "float32"}]}, "It belongs in a recipe."),
        ({"models": [{"model": "org/ada", "parameters": {"normalize": True}}]}, "move it to the recipe's parameters."),
        ({"parameters": {"lamda": 1}}, "Unknown parameter of ties 'lamda'."),
        (
            {"parameters": {"lambda": 1, "scaling": 2}},
            "the recipe has both 'scaling' and 'lambda', which mean the same: keep one.",
        ),
        ({"parameters": [1]}, "The parameters of the recipe are a mapping of names to numbers, got list."),
        (
            {"models": [{"model": "org/ada", "parameters": 1}]},
            "The parameters of org/ada are a mapping of names to numbers, got int.",
        ),
        ({"parameters": {"density": "half"}}, "'density' is a finite number, got 'half'."),
        ({"models": ["org/base"]}, "ties merges at least 1 models, got 0."),
        ({"merge_method": "slerp", "models": ["org/a", "org/b", "org/base"]}, "slerp merges exactly 2 models, got 3."),
        ({"seed": "x"}, "`seed` is a whole number, got 'x'."),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_wrong_is_said(changes, message):
    with pytest.raises(RecipeError) as caught:
        from_dict(usual(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", "This is not YAML: "),
        ("", "Expected a mapping at the top of the YAML, got NoneType."),
        ("- a\n- b", "Expected a mapping at the top of the YAML, got list."),
        ("a: 1\n---\nb: 2", "Expected one YAML document, got 2: a chain of merges, as mergekit-multi runs,"),
        ("merge_method: ties\nmerge_method: linear", "'merge_method' is written twice in one mapping, near line 1."),
        ("a: !!python/object/apply:os.system ['true']", "This is not YAML: "),
    ],
    ids=lambda value: value[:20],
)
def test_text_that_is_no_mapping_is_refused(text, message):
    with pytest.raises(RecipeError) as caught:
        load_mapping(text)
    assert message in str(caught.value)


def test_something_else_than_a_mapping_is_refused():
    with pytest.raises(RecipeError, match="A recipe is a mapping with keys such as merge_method and models, got list"):
        from_dict([])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"merge_method: [", "This is not YAML"),
        (b"\xff\xfe\x00", "can't decode"),
        (b"a: 1", "Unknown key"),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_number_in_scientific_notation_is_a_number() -> None:
    text = "merge_method: ties\nbase_model: org/base\nmodels: [org/a]\nparameters: {density: 5e-1, lambda: 1e-3}\n"
    recipe = loads(text)
    assert (recipe.parameters["density"], recipe.parameters["scaling"]) == (0.5, 0.001)
