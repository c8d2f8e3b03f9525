"""The examples do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from hf_merge.auto import study_arguments
from hf_merge.demo.specialists import FamilyFolder
from hf_merge.recipes import yaml

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_example_recipe_is_a_recipe() -> None:
    recipe = yaml.load(EXAMPLES / "recipe.yaml")
    assert (recipe.method, [m.name for m in recipe.models], recipe.dtype) == ("ties", ["math", "code"], "bfloat16")


def test_the_example_study_gives_arguments() -> None:
    arguments = study_arguments(yaml.load_mapping((EXAMPLES / "study.yaml").read_text()))
    assert [objective.name for objective in arguments["objectives"]] == ["math", "code"]
    assert arguments["trials"] == 100


@pytest.mark.slow
def test_the_example_script_runs(specialists: FamilyFolder, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "three_specialists.py")]
    ran = subprocess.run(command, cwd=tmp_path, env=os.environ.copy(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "question:LOC" in ran.stdout
    assert (tmp_path / "front.png").stat().st_size > 10_000


def test_the_example_of_slices_is_a_recipe_of_48_layers() -> None:
    recipe = yaml.load(EXAMPLES / "slices.yaml")
    assert recipe.layers is not None
    assert sum(part.sources[0].length or 0 for part in recipe.layers.slices) == 48


def test_the_example_of_adapters_is_a_recipe() -> None:
    recipe = yaml.load(EXAMPLES / "adapters.yaml")
    assert (recipe.method, recipe.arguments()["weights"]) == ("task_arithmetic", [0.5, 0.3, 0.2])


@pytest.mark.slow
def test_the_example_notebook_runs_and_shows_pictures(specialists: FamilyFolder, tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "three_specialists.ipynb", 4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {kind for cell in notebook.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())}
    assert {"text/html", "image/png"} <= shown
    assert notebook.cells[-2].outputs[-1].data["text/plain"] == "'question:LOC'"


def test_the_example_notebook_tells_nothing_of_the_machine_that_ran_it() -> None:
    text = (EXAMPLES / "three_specialists.ipynb").read_text()
    assert not re.search(r"/(root|home|tmp|Users)/", text)
