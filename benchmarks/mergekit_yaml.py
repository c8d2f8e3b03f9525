"""Which of mergekit's YAML files are understood: python benchmarks/mergekit_yaml.py FOLDER

Reads every .yml and .yaml file under the folder, and every fenced YAML block with a `merge_method` in its .md files. Nothing is
downloaded. mergekit's files are at https://github.com/arcee-ai/mergekit in examples/, docs/ and README.md.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from hf_merge.errors import RecipeError
from hf_merge.recipes.yaml import from_dict, loads, to_dict

BLOCK = re.compile(r"```ya?ml\n(.*?)```", re.DOTALL)


def texts(folder: Path) -> Iterable[tuple[str, str]]:
    """Where each recipe stands, and its text."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".yml", ".yaml", ".md") and path.is_file()):
        content, where = path.read_text(encoding="utf-8"), str(path.relative_to(folder))
        if path.suffix != ".md":
            yield where, content
            continue
        for found in BLOCK.finditer(content):
            if "merge_method" in found[1]:
                yield f"{where}:{content.count(chr(10), 0, found.start()) + 1}", found[1]


def main(folder: Path) -> None:
    understood, refused = 0, []
    for where, text in texts(folder):
        try:
            recipe = loads(text)
            if from_dict(to_dict(recipe)).digest != recipe.digest:
                raise AssertionError(f"{where} is another recipe when it is written and read again.")
            understood += 1
            print(f"{where}: {recipe}")
        except RecipeError as error:
            refused.append(f"{where}: {str(error).splitlines()[0]}")
    print(f"\n{understood} understood, {len(refused)} refused{':' if refused else '.'}", *refused, sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
