import subprocess
import sys
from pathlib import Path

import pytest

import hf_merge

HEAVY = ("torch", "transformers", "datasets", "evaluate", "optuna", "peft", "accelerate", "matplotlib", "pandas", "numpy")

# The public names: change this list and hf_merge/__init__.py together.
PUBLIC = sorted(
    [
        "CheckpointError",
        "EvaluationError",
        "Front",
        "HfMergeError",
        "METHODS",
        "MergeError",
        "MergeResult",
        "Method",
        "ModelRef",
        "Objective",
        "PublishError",
        "Recipe",
        "RecipeError",
        "RecipeModel",
        "Score",
        "Space",
        "Trial",
        "auto_merge",
        "check",
        "merge",
        "merge_adapters",
    ]
)


def in_a_fresh_interpreter(code: str) -> str:
    root = Path(hf_merge.__file__).parent.parent
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    "code",
    ["import hf_merge", "import hf_merge; dir(hf_merge)", "import hf_merge.errors, hf_merge.model_ref, hf_merge.version"],
)
def test_importing_hf_merge_loads_nothing_heavy(code):
    assert in_a_fresh_interpreter(f"{code}\nimport sys\nprint(*[m for m in {HEAVY} if m in sys.modules])") == ""


def test_the_public_names_are_these():
    assert sorted(n for n in hf_merge.__all__ if not n.startswith("_")) == PUBLIC


def test_the_public_names_are_listed():
    assert set(PUBLIC) <= set(dir(hf_merge))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_resolves_to_what_its_own_module_defines(name):
    found = getattr(hf_merge, name)
    assert name == "METHODS" or (found.__name__ == name and found.__module__.startswith("hf_merge."))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        hf_merge.no_such_name  # noqa: B018
