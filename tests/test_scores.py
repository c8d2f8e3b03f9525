"""Accuracies that count rows near to the decision in part."""

import numpy as np
import pytest
from scipy.stats import norm

from hf_merge.scores import BAND, smoothed

RNG = np.random.default_rng(0)
MARGINS = RNG.normal(0.5, 1.0, size=(4, 200))


def test_a_row_is_as_right_as_its_margin_is_long() -> None:
    widths = BAND * np.sqrt((MARGINS**2).mean(1, keepdims=True))
    assert smoothed(MARGINS) == pytest.approx(norm.cdf(MARGINS / widths))
    assert smoothed(MARGINS[0]) == pytest.approx(smoothed(MARGINS)[0])


def test_only_the_proportions_of_margins_matter() -> None:
    assert smoothed(1e-3 * MARGINS) == pytest.approx(smoothed(MARGINS))
    assert smoothed(-MARGINS) == pytest.approx(1 - smoothed(MARGINS))


def test_margins_that_are_all_the_same_and_none_at_all() -> None:
    assert smoothed(np.ones(3)) == pytest.approx(norm.cdf(1 / BAND))
    assert smoothed(np.zeros(3)) == pytest.approx(0.5)


def test_what_is_expected_of_margins_is_the_mean_over_them() -> None:
    """To the width, which is that of the mean square."""
    variances = np.full(MARGINS.shape, 0.3)
    drawn = MARGINS + np.sqrt(0.3) * RNG.normal(size=(4000, *MARGINS.shape))
    assert smoothed(MARGINS, variances).mean(1) == pytest.approx(smoothed(drawn).mean((0, 2)), abs=2e-3)


def test_half_the_rows_say_as_much_of_which_model_is_better() -> None:
    """Models whose margins differ by a shift that all rows share, and each row by its own."""
    shifts = np.linspace(0, 0.5, 12)

    def drawn(rows: int) -> np.ndarray:
        return 0.3 + shifts[:, None] + RNG.normal(size=rows) + 0.3 * RNG.normal(size=(len(shifts), rows))

    def told(rows: int, smooth: bool) -> float:
        found = [drawn(rows) for _ in range(200)]
        shares = [(smoothed(m) if smooth else m > 0).mean(1) for m in found]
        return float(np.mean([np.corrcoef(share, shifts)[0, 1] for share in shares]))

    assert told(64, True) > told(128, False)
