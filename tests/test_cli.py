"""The command line: answers on stdout, what is wrong on stderr (or as JSON), exit codes, and no import that is not needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from tiny_models import WORDS, Maker
from transformers import AutoModelForCausalLM

import hf_merge
from hf_merge.cli import main
from hf_merge.demo.hub.server import LocalHub
from hf_merge.recipes import yaml
from hf_merge.version import __version__

COMMANDS = ("check", "merge", "auto", "worker", "front", "push", "demo")
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "evaluate",
    "optuna",
    "peft",
    "accelerate",
    "matplotlib",
    "pandas",
    "numpy",
    "yaml",
)


@pytest.fixture
def recipe(make: Maker, tmp_path: Path) -> Path:
    """A recipe file on local models."""
    base, one, two = make("llama", 3)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"merge_method: ties\nbase_model: {base}\nmodels: [{{model: {one}}}, {{model: {two}}}]\n")
    return path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=Path(hf_merge.__file__).parents[1], capture_output=True, text=True)


def test_check_says_what_would_be_done(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", recipe) == 0
    out, err = capsys.readouterr()
    assert "TIES of model1" in out
    assert "Result: 21 tensors, 21,664 parameters, 0.1 MB in 1 shard; reads 0.3 MB." in out
    assert err == ""


def test_check_answers_machines_in_json(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", recipe, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["tensors"], answer["parameters"], answer["shards"]) == (21, 21664, ["model.safetensors"])
    assert answer["bytes_read"] == 3 * 21664 * 4


def test_check_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run("check", recipe) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_merge_writes_a_model_and_says_where(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", recipe, tmp_path / "out", "--quiet") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].endswith(f" s: {tmp_path / 'out'}")
    assert err == ""
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_merge_answers_machines_in_json_alone(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", recipe, tmp_path / "out", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["where"] == str(tmp_path / "out")
    assert "Merging" in err


@pytest.mark.parametrize(("size", "shards"), [("30000", 4), ("30KB", 4), ("1GB", 1)])
def test_shards_have_the_size_that_is_asked_for(size: str, shards: int, recipe: Path, tmp_path: Path) -> None:
    assert run("merge", recipe, tmp_path / "out", "--max-shard-size", size, "--quiet") == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards


def test_merge_replaces_only_when_told_to(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", recipe, tmp_path / "out", "--quiet") == 0
    assert run("merge", recipe, tmp_path / "out", "--quiet") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run("merge", recipe, tmp_path / "out", "--quiet", "--overwrite") == 0


def test_merge_goes_straight_to_the_hub(recipe: Path, hub: LocalHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", recipe, "--push-to", "demo/from-cli", "--private", "--quiet", "--json") == 0
    assert "demo/from-cli" in json.loads(capsys.readouterr().out)["where"]
    assert HfApi().model_info("demo/from-cli").private


def fails(recipe: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run("merge", recipe, *arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("ties", "tie", "Unknown merge method 'tie'. Did you mean 'ties'?"),
        ("models:", "model:", "Did you mean 'models'?"),
        ("merge_method", "merge_methods", "Did you mean 'merge_method'?"),
        ("/model1", "/nowhere", "nowhere is not a folder"),
        ("ties", "ties\nslices: [{sources: []}]", "exactly one of 'models', 'slices' and 'modules'"),
        ("ties", "ties\ndtype: float8", "Unknown dtype 'float8'"),
        ("merge_method: ties", "{", "This is not YAML"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said_on_stderr(
    before: str, after: str, said: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(recipe.read_text().replace(before, after, 1))
    assert said in fails(recipe, capsys, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "RecipeError: Give either `out`, a folder, or `push_to`"),
        (["out", "--push-to", "demo/x"], "RecipeError: Give either `out`, a folder, or `push_to`"),
        (["out", "--max-shard-size", "huge"], "RecipeError: max_shard_size is a size such as 5GB"),
        (["--push-to", "somebody/x"], "PublishError: somebody/x cannot be created"),
    ],
)
def test_what_is_wrong_with_arguments_together_is_said_on_stderr(
    arguments: list[str], said: str, recipe: Path, hub: LocalHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(recipe, capsys, *arguments).startswith(said)


def test_recipe_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no.yaml"
    assert fails(missing, capsys, tmp_path / "out").strip() == f"RecipeError: {missing}: No such file or directory"


def test_errors_are_json_on_stdout_for_machines(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(recipe.read_text().replace("ties", "tie"))
    assert run("merge", recipe, tmp_path / "out", "--json") == 1
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["error"] == "RecipeError"
    assert "Did you mean 'ties'?" in answer["message"]
    assert err == ""


@pytest.mark.parametrize(
    "arguments",
    [[], ["marge"], ["merge"], ["merge", "r.yaml", "out", "more"], ["check", "r.yaml", "--no-such"], ["push", "run"]],
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: hf-merge" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_of_its_own(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: hf-merge {command}")
    assert "--json" in out


def test_the_recipe_in_the_help_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    example = text[text.index("  merge_method:") : text.index("A study is")]
    assert yaml.loads(example).method == "ties"
    assert all(command in text for command in COMMANDS)


def test_the_module_runs_as_a_program_and_ends_with_its_exit_code(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "hf_merge.cli"]
    shown = subprocess.run([*program, "--version"], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (0, f"hf_merge {__version__}\n")
    assert subprocess.run([*program, "nothing"], capture_output=True).returncode == 2


LOADED = f"""
import sys
from hf_merge.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print("\\n", code, *[name for name in {HEAVY} if name in sys.modules])
"""


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert python(LOADED, *arguments).stdout.splitlines()[-1].split() == ["0"]


def test_merge_loads_neither_evaluation_nor_search(recipe: Path, tmp_path: Path) -> None:
    done = python(LOADED, "merge", recipe, tmp_path / "out", "--quiet")
    code, *loaded = done.stdout.splitlines()[-1].split()
    assert code == "0", done.stderr
    assert set(loaded) == {"torch", "numpy", "yaml"}


@pytest.fixture
def study(make: Maker, tmp_path: Path) -> Path:
    """A study file on local models and texts."""
    base, one, two = make("llama", 3)
    for name in ("ab", "cd"):
        rows = [json.dumps({"text": f"{WORDS[i % 7]} {WORDS[i % 5]} {WORDS[i % 3]}"}) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    objectives = [{"name": n, "task": "language-modeling", "dataset": str(tmp_path / f"{n}.jsonl")} for n in ("ab", "cd")]
    path = tmp_path / "study.yaml"
    content = {"base": str(base), "models": [str(one), str(two)], "objectives": objectives, "trials": 6, "device": "cpu"}
    path.write_text(json.dumps(content | {"folder": str(tmp_path / "run")}))
    return path


def test_workers_and_auto_share_a_study(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    assert run("worker", study, "--storage", storage, "--study", "both", "--trials", 5, "--quiet", "--json") == 0
    assert json.loads(capsys.readouterr().out)["evaluated"] == 5
    assert run("auto", study, "--storage", storage, "--study", "both", "--quiet", "--json") == 0
    assert json.loads(capsys.readouterr().out)["search"]["evaluated"] == 6
    assert not (tmp_path / "run" / "study.log").exists()


def test_a_worker_without_a_storage_is_told_to_name_one(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("worker", study) == 1
    assert "give --storage, such as postgresql://user@host/name" in capsys.readouterr().err


def test_a_worker_with_other_data_is_refused(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    assert run("worker", study, "--storage", storage, "--quiet") == 0
    (tmp_path / "ab.jsonl").write_text("\n".join(json.dumps({"text": f"{WORDS[i % 4]} {WORDS[i % 6]}"}) for i in range(40)))
    capsys.readouterr()
    assert run("worker", study, "--storage", storage, "--folder", tmp_path / "other", "--quiet") == 1
    assert "was started with other settings:\n  fingerprint, data: was" in capsys.readouterr().err


def test_a_worker_keeps_constraints(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study.write_text(json.dumps(json.loads(study.read_text()) | {"constraints": {"ab": "<= base"}}))
    assert run("worker", study, "--storage", f"sqlite:///{tmp_path}/study.db", "--quiet") == 0
    assert "Study 'hf_merge': 6 recipes evaluated" in capsys.readouterr().out
