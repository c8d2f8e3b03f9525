"""Metrics of generated texts."""

import re
import string
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import datasets
import numpy as np

from hf_merge.errors import EvaluationError, unknown
from hf_merge.evaluation.metrics.summed import Floats, Mean, SummedMetric, Values

_TEXT = datasets.Value("string")
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?|-?\.\d+")
# Extras: everything else here works without them.
_SACREBLEU: Any = import_module("sacrebleu.metrics") if find_spec("sacrebleu") else None
_ROUGE: Any = import_module("rouge_score.rouge_scorer") if find_spec("rouge_score") else None


class ExactMatch(Mean):
    """The share of texts that equal the expected ones, whitespace at both ends aside.

    `ignore_case` and `ignore_punctuation` (ASCII) loosen the comparison.
    """

    key, feature, parameters = "exact_match", _TEXT, ("ignore_case", "ignore_punctuation")
    about = "Share of texts that equal the reference once stripped; ignore_case, ignore_punctuation."

    def row(self, given: str, wanted: str, **arguments: Any) -> float:
        return float(plain(given, **arguments) == plain(wanted, **arguments))


class NumberMatch(Mean):
    """The share of texts whose last number equals the last number of the reference: "… = $1,234.50." is 1234.5.

    A text without a number is wrong. Numbers are decimal, with or without commas between thousands; they are compared exactly.
    """

    key, feature = "number_match", _TEXT
    about = "Share of texts whose last number equals the reference's last number."

    def row(self, given: str, wanted: str, **arguments: Any) -> float:
        if (expected := last_number(wanted)) is None:
            raise EvaluationError(f"number_match needs a number in every target, and {wanted!r:.100} has none.")
        return float(last_number(given) == expected)


class ChrF(SummedMetric):
    """Character n-gram F-score of a corpus, 0 to 100, by sacrebleu (Popović, "chrF", 2015); an outcome is a row's own chrF.

    Arguments are those of `sacrebleu.metrics.CHRF`: `char_order` 6, `word_order` 0 (2 for chrF++), `beta` 2, `lowercase`.
    """

    key, feature = "chrf", _TEXT
    parameters = ("char_order", "word_order", "beta", "lowercase", "whitespace", "eps_smoothing")
    about = "chrF of sacrebleu; char_order, word_order, beta, lowercase."

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        settings = tuple(sorted(arguments.items()))
        return np.array([_chrf_counts(*pair, settings) for pair in zip(predictions, references, strict=True)], dtype=np.float64)

    def value(self, sums: Floats, **arguments: Any) -> Floats:
        score = _sacrebleu_chrf(arguments)._compute_f_score
        return np.array([score(row) for row in sums.tolist()])


class Rouge(Mean):
    """The mean over the rows of a ROUGE F-measure, 0 to 1, by rouge-score (Lin, "ROUGE", 2004).

    `kind` is "rougeL" (default), "rouge1", "rouge2" … or "rougeLsum"; `use_stemmer` (Porter, for English) is off.
    """

    key, feature, parameters = "rouge", _TEXT, ("kind", "use_stemmer")
    about = "Mean ROUGE F-measure of rouge-score; kind: rougeL (default), rouge1, rouge2, rougeLsum; use_stemmer."

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        if _ROUGE is None:
            raise EvaluationError("The metric rouge needs rouge-score: pip install 'hf_merge[rouge]'.")
        kind = arguments.get("kind", "rougeL")
        if not re.fullmatch(r"rouge(L|Lsum|[1-9])", kind):
            raise EvaluationError(unknown("kind of rouge", kind, ("rouge1", "rouge2", "rougeL", "rougeLsum")))
        return super().statistics(predictions, references, kind=kind, use_stemmer=arguments.get("use_stemmer", False))

    def row(self, given: str, wanted: str, **arguments: Any) -> float:
        return _rouge(given, wanted, arguments["kind"], arguments["use_stemmer"])


def plain(value: Any, ignore_case: bool = False, ignore_punctuation: bool = False) -> Any:
    """A text as it is compared: without whitespace at its ends; anything else as it is."""
    if not isinstance(value, str):
        return value
    text = value.casefold() if ignore_case else value
    return (re.sub(f"[{re.escape(string.punctuation)}]", "", text) if ignore_punctuation else text).strip()


def last_number(text: str) -> Decimal | None:
    """The last decimal number in a text; None if there is none. A minus right after a digit or letter is no sign."""
    found = None
    for match in _NUMBER.finditer(text):
        found = match
    if found is None:
        return None
    number = Decimal(found[0].replace(",", ""))
    binary_minus = found[0].startswith("-") and found.start() > 0 and text[found.start() - 1].isalnum()
    return -number if binary_minus else number


# Most candidates of a search write what others wrote before them.
@lru_cache(maxsize=2**16)
def _chrf_counts(given: str, wanted: str, settings: tuple[tuple[str, Any], ...]) -> tuple[float, ...]:
    return tuple(_sacrebleu_chrf(dict(settings))._extract_corpus_statistics([given], [[wanted]])[0])


@lru_cache(maxsize=2**16)
def _rouge(given: str, wanted: str, kind: str, use_stemmer: bool) -> float:
    return float(_rouge_scorer(kind, use_stemmer).score(wanted, given)[kind].fmeasure)


@lru_cache
def _rouge_scorer(kind: str, use_stemmer: bool) -> Any:
    return _ROUGE.RougeScorer([kind], use_stemmer=use_stemmer)


def _sacrebleu_chrf(arguments: Mapping[str, Any]) -> Any:
    if _SACREBLEU is None:
        raise EvaluationError("The metric chrf needs sacrebleu: pip install 'hf_merge[chrf]'.")
    return _SACREBLEU.CHRF(**arguments)
