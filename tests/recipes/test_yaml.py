from pathlib import Path

import pytest

from hf_merge.errors import RecipeError
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe, RecipeModel
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


def test_a_recipe_is_written_as_the_golden_file():
    assert dumps(golden_recipe()) == GOLDEN.read_text(encoding="utf-8")


def test_the_golden_file_is_read_as_the_recipe():
    assert load(GOLDEN).digest == golden_recipe().digest


def test_a_recipe_without_shared_numbers_base_or_dtype_writes_none():
    slerp = Recipe(method="slerp", models=("org/ada", "org/bob"))
    assert to_dict(slerp) == {
        "merge_method": "slerp",
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
    assert made.arguments() == {"weights": [0.5, 0.3], "density": [0.5, 0.5], "normalize": True, "scaling": 1.0}


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


def test_a_missing_density_is_our_default_where_mergekits_is_1():
    assert from_dict(usual()).arguments()["density"] == [0.2, 0.2]


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


@pytest.mark.parametrize("key", ["slices", "modules", "tokenizer", "tokenizer_source", "chat_template", "out_dtype", "name"])
def test_what_mergekit_can_and_we_cannot_is_refused_by_name(key):
    with pytest.raises(RecipeError, match=f"'{key}' in a recipe is mergekit's, and this version of hf_merge cannot do it yet"):
        from_dict({key: "x"} | usual())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parameters": {"t": [0, 0.5, 1]}},
            "'t' of the recipe: gradients and filters are not supported yet, give one number.",
        ),
        (
            {"models": [{"model": "org/ada", "parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 0}]}}]},
            "'weight' of org/ada: gradients and filters are not supported yet, give one number.",
        ),
        ({"parameters": {"weight": {"filter": "mlp"}}}, "'weight' of the recipe: gradients and filters are not supported yet"),
        ({"models": ["org/ada+org/lora"]}, "Adapters as models are not supported yet: 'org/ada+org/lora'."),
        (
            {"models": [{"model": {"model": "a", "lora": "b"}}]},
            "Adapters as models are not supported yet: {'model': 'a', 'lora': 'b'}.",
        ),
        ({"base_model": {"path": "a", "adapter": "b"}}, "Adapters as models are not supported yet"),
        ({"merge_method": "della"}, "Unknown merge method 'della'."),
        ({"merge_method": "tise"}, "Unknown merge method 'tise'. Did you mean 'ties'?"),
        ({"merge_method": ["ties"]}, "Unknown merge method ['ties']."),
        ({"merge_method": None}, "A recipe needs 'merge_method'."),
        ({"models": None}, "A recipe needs 'models'."),
        ({"models": "org/ada"}, "'models' is a list, got str."),
        ({"models": [{"name": "ada"}]}, "A model's entry needs 'model', got {'name': 'ada'}."),
        ({"models": [None]}, "A model is 'namespace/name', 'namespace/name@revision' or a path, got None."),
        ({"models": [{"model": None}]}, "or a path, got None."),
        ({"models": [{"model": 7}]}, "or a path, got 7."),
        ({"models": [{"model": {"revision": "v1"}}]}, "A model's reference needs 'path', got {'revision': 'v1'}."),
        (
            {"models": [{"model": {"path": "a", "revison": "v1"}}]},
            "Unknown key in a model's reference: 'revison'. Did you mean 'revision'?",
        ),
        ({"models": ["no good"]}, "'no good' is neither a local folder nor a Hub id."),
        ({"merge_metod": "ties"}, "Unknown key in a recipe: 'merge_metod'. Did you mean 'merge_method'?"),
        ({"method": "ties"}, "Unknown key in a recipe: 'method'. Did you mean 'merge_method'?"),
        ({"model": "org/ada"}, "It belongs in a model's entry."),
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
    assert recipe.parameters == {"density": 0.5, "scaling": 0.001}
