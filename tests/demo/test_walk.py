"""The demo as a whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_merge.cli import main
from hf_merge.demo.specialists import FamilyFolder
from hf_merge.demo.walk import walk
from hf_merge.errors import HfMergeError


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(HfMergeError, match="something else"):
        walk(tmp_path, trials=8, seed=0)
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_a_story_that_ends_badly_is_an_error_and_not_a_summary(
    specialists: FamilyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The parents, their average and the base are five.
    assert main(["demo", "--trials", "2", "--folder", str(tmp_path), "--quiet"]) == 1
    assert "exit code 1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_published_model_scores_what_its_card_says(specialists: FamilyFolder, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hf_merge.cli", "demo", "--json", "--quiet", "--trials", "8"]
    command += ["--folder", str(tmp_path / "run"), "--cards", str(tmp_path / "cards")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert {name: before for name, (before, _) in told["scores"].items()} == {
        n: again for n, (_, again) in told["scores"].items()
    }
    assert told["front"] >= 3
    (card,) = (tmp_path / "cards").glob("*.md")
    assert f"(<{card.stem}.png>)" in card.read_text()
    assert card.with_suffix(".png").is_file()
