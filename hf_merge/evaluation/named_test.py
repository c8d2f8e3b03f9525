"""Test sets, known by their names: a search on one spoils it."""

import logging
import re
from pathlib import Path

from hf_merge.evaluation.objective import Objective

_TEST = re.compile(r"(?<![a-z])test(s|set|ing)?(?![a-z])", re.IGNORECASE)
_DATA_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
_logger = logging.getLogger(__name__)


def searches_test_data(objective: Objective, split: str) -> bool:
    """Whether the rows that a search looks at (of `split`), their configuration or their file are named a test set."""
    file = Path(objective.dataset) if isinstance(objective.dataset, str | Path) else Path()
    names = (split, objective.config or "", file.stem if file.suffix in _DATA_FILES else "")
    return any(_TEST.search(name) for name in names)


def warn_of_test_data(objective: Objective, split: str) -> None:
    """Says in the log what a search on a test set costs, if this is one."""
    if searches_test_data(objective, split):
        _logger.warning(
            "Objective %r: the search looks at test data (%s). What it finds suits those rows, so scores on that test set say "
            "nothing any more; the card will say so. Give `split` another one, such as validation or train.",
            objective.name,
            split,
        )
