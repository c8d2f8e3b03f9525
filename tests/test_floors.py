"""The house holds: imports point down, one home for each library, no drawers for odds and ends, nothing overlong."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import hf_merge

ROOT = Path(hf_merge.__file__).parent

FLOORS = {
    "errors": -1,  # below model_ref, which raises them
    "shown": -1,
    "version": -1,
    "model_ref": 0,
    "cache": 0,
    "patience": 0,
    "tensors": 1,
    "pareto": 1,
    "scores": 1,
    "methods": 2,
    "recipes": 3,
    "checkpoints": 3,
    "merging": 4,
    "evaluation": 4,
    "search": 5,
    "publishing": 6,
    "adapters": 7,
    "single": 7,
    "scoring": 7,
    "aligned": 8,
    "wiring": 8,
    "result": 8,
    "hierarchical": 9,
    "auto": 10,
    "demo": 11,
}
FACES = ("__init__", "cli")
"""May import everything, and lazily."""

STRANGERS = {"search": {"evaluation", "merging", "checkpoints"}, "publishing": {"evaluation", "merging", "checkpoints"}}
"""What stands lower and is not theirs all the same: they get a function instead."""

HOMES = {
    "yaml": ("recipes.yaml", "demo.hub", "publishing.license"),  # the demo's Hub reads cards; a card's loader raises YAMLError
    "optuna": ("search",),
    "evaluate": ("evaluation",),
    "safetensors": ("checkpoints", "demo", "search.layers.stored"),
    "matplotlib": ("publishing.plots",),
}

DRAWERS = {"utils", "helpers", "common", "misc", "core"}

FILE_LINES, FUNCTION_LINES = 300, 40
ALLOWED: Mapping[str, str] = {
    "auto.py:auto_merge": "all that a search can be told, checked and handed on in order",
    "cli.py:parser": "the whole command line, declared once",
    "demo/hub/server.py": "one interface to a Hub in a thread and to one in a process, side by side",
    "demo/hub/store.py": "the repository and the store that locks it know each other's files",
    "demo/story.py:tell": "a story, told in order",
    "result.py": "one object: all that can be asked of a result, and how it is kept",
    "tensors/loops.py": "numba compiles a loop anew if its file changes, and not if another file does that it takes loops from",
    "tensors/loops.py:rank": "one row after the other through all steps, while it is in the fastest cache",
    "tensors/loops.py:stays": "one row after the other through all steps, while it is in the fastest cache",
    "wiring.py:searched": "all that a search can be told, checked and handed on in order",
    "publishing/plots.py": "one picture: its styles, its places and its labels",
}
"""What is overlong ("folder/file.py" or "folder/file.py:function"), and why it may be."""

Sources = Mapping[str, str]
"""Module name below hf_merge (`recipes.yaml`, `methods.__init__`) to its text."""


def read() -> Sources:
    files = sorted(ROOT.rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file.read_text(encoding="utf-8") for file in files}


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str, str | None]]:
    """Each import in `tree`: its statement, the module, and the name that is taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, "." * node.level + (node.module or ""), alias.name) for alias in node.names)


def own(module: str, name: str | None, sources: Sources) -> str | None:
    """The module of ours that an import reaches; None for other people's."""
    if module != "hf_merge" and not module.startswith(("hf_merge.", ".")):
        return None
    below = module.removeprefix("hf_merge").lstrip(".")
    for target in (f"{below}.{name}".lstrip("."), below):
        for file in (target, f"{target}.__init__".lstrip(".")):
            if file in sources:
                return file
    return below


def edges(sources: Sources) -> list[tuple[str, str]]:
    trees = {module: ast.parse(text) for module, text in sources.items()}
    found = ((m, own(module, name, sources)) for m, tree in trees.items() for _, module, name in imports(tree))
    return [(module, target) for module, target in found if target is not None]


def unit(module: str) -> str:
    return module.split(".")[0]


def homeless(sources: Sources) -> list[str]:
    return sorted({unit(m) for m in sources} - set(FLOORS) - set(FACES))


def upward(sources: Sources) -> list[str]:
    """Imports that do not point to a lower floor, or that reach what is not theirs."""
    return [
        f"{a} imports {b}"
        for a, b in edges(sources)
        if unit(a) not in FACES
        and unit(a) != unit(b)
        and (FLOORS.get(unit(a), 99) <= FLOORS.get(unit(b), 99) or unit(b) in STRANGERS.get(unit(a), ()))
    ]


def cycles(sources: Sources) -> list[str]:
    """Modules of one package that reach themselves."""
    inside: dict[str, set[str]] = {}
    for a, b in edges(sources):
        if unit(a) == unit(b):
            inside.setdefault(a, set()).add(b)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            fresh = inside.get(todo.pop(), set()) - seen
            seen |= fresh
            todo += fresh
        return seen

    return [module for module in inside if module in reached(module)]


def through_a_face(sources: Sources) -> list[str]:
    """Names taken from a package instead of the module that defines them; the table of methods is one on purpose."""
    return [
        f"{a} imports {b}"
        for a, b in edges(sources)
        if a not in FACES and (b.endswith("__init__") or b == "cli") and b != "methods.__init__"
    ]


def relative(sources: Sources) -> list[str]:
    return [f"{a}: {module}" for a, text in sources.items() for _, module, _ in imports(ast.parse(text)) if module[0] == "."]


def hidden(sources: Sources) -> list[str]:
    """Own imports inside functions or under TYPE_CHECKING, which hide cycles."""
    found = []
    for module, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            unseen = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if module not in FACES and (lazy or unseen):
                found += [f"{module} imports {m}" for _, m, name in imports(node) if own(m, name, sources) is not None]
    return found


def away_from_home(sources: Sources) -> list[str]:
    """Imports of a library outside the one place that knows it."""
    return [
        f"{a} imports {module}"
        for a, text in sources.items()
        for _, module, _ in imports(ast.parse(text))
        for home in [HOMES.get(unit(module))]
        if home is not None and not any(a == h or a.startswith(f"{h}.") for h in home)
    ]


def drawers(sources: Sources) -> list[str]:
    return [module for module in sources if DRAWERS & set(module.split("."))]


def overlong(sources: Sources) -> list[str]:
    """Files and functions over the limits, as ALLOWED names them. A function is as long as its body without the docstring."""
    found = []
    for module, text in sources.items():
        path = module.replace(".", "/") + ".py"
        if len(text.splitlines()) > FILE_LINES:
            found.append(path)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and (body[-1].end_lineno or 0) - body[0].lineno + 1 > FUNCTION_LINES:
                    found.append(f"{path}:{node.name}")
    return found


RULES = [homeless, upward, cycles, through_a_face, relative, hidden, away_from_home, drawers]


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_the_rule(rule):
    assert rule(read()) == []


def test_what_is_overlong_has_a_reason():
    assert [place for place in overlong(read()) if not ALLOWED.get(place)] == []


def test_what_has_a_reason_is_overlong():
    sources = read()
    there = {place for place in ALLOWED if place.partition(".py")[0].replace("/", ".") in sources}
    assert there - set(overlong(sources)) == set()


LONG_FUNCTION = 'def f():\n    """One."""\n' + "    x = 1\n" * 41


@pytest.mark.parametrize(
    ("rule", "sources"),
    [
        (homeless, {"attic": ""}),
        (homeless, {"attic.box": ""}),
        (upward, {"methods.ties": "from hf_merge.recipes.recipe import Recipe"}),
        (upward, {"recipes.recipe": "import hf_merge.checkpoints.index"}),
        (upward, {"pareto": "from hf_merge.scores import Scores"}),
        (upward, {"search.study": "from hf_merge.merging.plan import plan"}),
        (upward, {"publishing.card": "from hf_merge.evaluation.measure import Evaluator"}),
        (upward, {"demo.data": "from hf_merge.attic import box"}),
        (cycles, {"search.a": "import hf_merge.search.b", "search.b": "from hf_merge.search import a"}),
        (cycles, {"search.a": "from hf_merge.search.a import x"}),
        (through_a_face, {"recipes.yaml": "from hf_merge import Recipe", "__init__": ""}),
        (through_a_face, {"merging.plan": "from hf_merge.recipes import Recipe", "recipes.__init__": ""}),
        (through_a_face, {"merging.plan": "import hf_merge.recipes", "recipes.__init__": ""}),
        (through_a_face, {"demo.main": "from hf_merge.cli import main", "cli": ""}),
        (relative, {"recipes.yaml": "from . import recipe"}),
        (hidden, {"merging.plan": "def f():\n    from hf_merge.recipes.recipe import Recipe", "recipes.recipe": ""}),
        (hidden, {"merging.plan": "async def f():\n    import hf_merge.errors"}),
        (hidden, {"merging.plan": "class C:\n    def f(self):\n        if 1:\n            import hf_merge.errors"}),
        (hidden, {"merging.plan": "if TYPE_CHECKING:\n    from hf_merge.errors import MergeError"}),
        (hidden, {"merging.plan": "if typing.TYPE_CHECKING:\n    from hf_merge.errors import MergeError"}),
        (away_from_home, {"recipes.recipe": "import yaml"}),
        (away_from_home, {"publishing.card": "from matplotlib.figure import Figure"}),
        (away_from_home, {"auto": "def f():\n    import optuna.samplers"}),
        (away_from_home, {"merging.live": "from safetensors.torch import save_file"}),
        (drawers, {"recipes.utils": ""}),
        (drawers, {"core.recipe": ""}),
        (overlong, {"auto": "x = 1\n" * 301}),
        (overlong, {"auto": LONG_FUNCTION}),
        (overlong, {"auto": "class C:\n    " + LONG_FUNCTION.replace("\n", "\n    ")}),
    ],
    ids=lambda value: value.__name__ if callable(value) else " ".join(map(str, value.values()))[:50],
)
def test_a_rule_finds_what_breaks_it(rule, sources):
    assert len(rule(sources)) == 1 if rule is not cycles else rule(sources)


@pytest.mark.parametrize("rule", [*RULES, overlong])
def test_the_rules_let_good_houses_stand(rule):
    good = {
        "errors": "class HfMergeError(Exception): ...",
        "model_ref": "from hf_merge.errors import HfMergeError",
        "methods.__init__": "from hf_merge.methods import ties\nMETHODS = {}",
        "methods.ties": "import torch",
        "recipes.yaml": "import yaml\nfrom hf_merge.methods import METHODS\nfrom hf_merge.recipes.recipe import Recipe",
        "recipes.recipe": "def f():\n    import json",
        "publishing.card": "from hf_merge.recipes import yaml\nfrom hf_merge.search.trial import Front",
        "search.study": "import optuna\nfrom hf_merge.search.trial import Trial",
        "search.trial": LONG_FUNCTION.replace("    x = 1\n", "", 1),
        "cli": "def main():\n    from hf_merge.auto import auto_merge",
        "__init__": "def __getattr__(name):\n    from hf_merge.auto import auto_merge",
        "auto": "x = 1\n" * 300,
    }
    assert rule(good) == []
