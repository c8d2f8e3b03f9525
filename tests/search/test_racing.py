"""Races on synthetic outcomes, where it is known what a candidate would have scored on all rows."""

from dataclasses import replace

import numpy as np
import pytest

from hf_merge import pareto
from hf_merge.scores import Score, smoothed
from hf_merge.search.racing import Racing, predicted_mean, predicted_share, race

ROWS = 800
DIRECTIONS = {"x": "maximize", "y": "maximize"}
REFERENCE = {"x": 0.2, "y": 0.2}


def outcomes(rng, ability, count=ROWS, rows=None):
    """Right or wrong by a difficulty that every model shares, so that outcomes of two models go together."""
    difficulty = np.random.default_rng(99).normal(size=count) if rows is None else rows
    return (difficulty + rng.normal(scale=0.7, size=count) < ability).astype(np.float32)


def whole(*values):
    return {
        name: Score(value=float(each.mean()), examples=len(each), outcomes=each)
        for name, each in zip(DIRECTIONS, values, strict=True)
    }


def model(seed, x, y):
    rng = np.random.default_rng(seed)
    return whole(outcomes(rng, x), outcomes(rng, y))


def part(scores, share, seed=0):
    rows = np.random.default_rng(seed).permutation(ROWS)[: round(share * ROWS)]
    return {
        name: replace(s, value=float(s.outcomes[rows].mean()), examples=len(rows), outcomes=s.outcomes[rows], rows=rows)
        for name, s in scores.items()
    }


def rounds(scores, seed=0):
    yield from (part(scores, share, seed) for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2))
    yield scores


@pytest.fixture(scope="module")
def front():
    """Trade-offs between two tasks, from (high, low) to (low, high)."""
    return [model(i, 1.2 * np.cos(a), 1.2 * np.sin(a)) for i, a in enumerate(np.linspace(0, np.pi / 2, 8))]


@pytest.fixture
def racing():
    return Racing(DIRECTIONS, REFERENCE)


def test_a_candidate_far_behind_the_front_stops_in_the_first_round(racing, front):
    assert racing.stops(part(model(50, -0.3, -0.3), 1 / 16), front)


def test_a_candidate_ahead_of_the_front_never_stops(racing, front):
    scores, stopped = race(rounds(model(51, 1.4, 1.4)), racing, front)
    assert not stopped
    assert scores["x"].rows is None


def test_a_candidate_behind_a_dense_front_stops_though_no_one_rival_surely_dominates_it(racing):
    rivals = [model(i, 0.6 + 0.02 * i, 0.6 - 0.02 * i) for i in range(6)]
    assert racing.stops(part(model(60, 0.2, 0.2), 1 / 4), rivals)


def test_a_twin_of_a_rival_stops_because_it_gains_nothing(racing, front):
    assert racing.stops(part(front[3], 1 / 4), front)


def test_the_best_in_one_objective_does_not_stop_for_being_poor_in_the_other(racing, front):
    assert not race(rounds(model(52, 2.0, -0.2)), racing, front)[1]


def test_what_is_minimized_counts_the_other_way_round(front):
    def turned(scores):
        return {n: replace(s, value=1 - s.value, outcomes=1 - s.outcomes) for n, s in scores.items()}

    racing = Racing(dict.fromkeys(DIRECTIONS, "minimize"), dict.fromkeys(DIRECTIONS, 0.8))
    rivals = [turned(scores) for scores in front]
    assert racing.stops(turned(part(model(50, -0.3, -0.3), 1 / 16)), rivals)
    assert not race((turned(p) for p in rounds(model(51, 1.4, 1.4))), racing, rivals)[1]


def volume(*rivals):
    return pareto.hypervolume(np.array([[s.value for s in scores.values()] for scores in rivals]), list(REFERENCE.values()))


@pytest.mark.parametrize("worth", [0.5, 2.0])
def test_what_stopped_would_have_gained_less_on_average_than_it_was_worth(worth, front):
    """Candidates from behind the front to ahead of it; `alone` is what a point of the front gains."""
    racing, tried, rng, gains = Racing(DIRECTIONS, REFERENCE, worth=worth), 40, np.random.default_rng(7), []
    alone = sum(volume(*front) - volume(*front[:i], *front[i + 1 :]) for i in range(len(front)))
    for i in range(80):
        angle, radius = rng.uniform(0, np.pi / 2), rng.uniform(0.9, 1.25)
        candidate = model(100 + i, radius * np.cos(angle), radius * np.sin(angle))
        if race(rounds(candidate, i), racing, front, tried)[1]:
            gains.append(volume(*front, candidate) - volume(*front))
    assert len(gains) >= 10
    assert np.mean(gains) < worth * alone / tried


def test_more_stops_if_more_is_asked_and_less_if_more_have_been_tried(front):
    candidates = [model(200 + i, 0.75 + i / 60, 0.75) for i in range(24)]

    def stopped(worth, tried):
        racing = Racing(DIRECTIONS, REFERENCE, worth=worth)
        return sum(racing.stops(part(candidate, 1 / 8), front, tried) for candidate in candidates)

    assert stopped(0, 10) < stopped(0.2, 10) < stopped(1, 10)
    assert stopped(1, 10) > stopped(1, 50) > stopped(1, 1000)


def test_the_fewer_rows_are_left_the_less_must_be_gained(front):
    """All else equal; a third objective, the same for all, has cost many rows or none."""
    racing = Racing(DIRECTIONS | {"z": "maximize"}, REFERENCE | {"z": 0.2}, worth=100)

    def stops(paid):
        z = {"z": Score(value=0.5, examples=paid)}
        return racing.stops(part(model(52, 0.95, 0.75), 1 / 8) | z, [scores | z for scores in front])

    assert stops(0)
    assert not stops(10**6 * ROWS)


def test_rows_that_rivals_disagree_about_come_first(racing):
    every = leads(6)
    rivals = [
        {
            name: Score(value=float((m > 0).mean()), examples=ROWS, outcomes=(m > 0).astype(np.float32), margins=m)
            for name in DIRECTIONS
        }
        for m in every
    ]
    right = (every > 0).mean(0)
    assert racing.priorities(rivals)["x"] == pytest.approx(right * (1 - right))
    assert racing.priorities(rivals[:2]) == {}
    assert racing.priorities([scores | {"y": replace(scores["y"], margins=None)} for scores in rivals]).keys() == {"x"}


@pytest.mark.parametrize("missing", ["an objective", "outcomes", "rivals", "rivals with outcomes"])
def test_nothing_stops_where_something_cannot_be_told(missing, racing, front):
    candidate, rivals = part(model(50, -0.3, -0.3), 1 / 4), front
    assert racing.stops(candidate, rivals)
    if missing == "an objective":
        candidate = {"x": candidate["x"]}
    elif missing == "outcomes":
        candidate = candidate | {"y": replace(candidate["y"], outcomes=None)}
    elif missing == "rivals":
        rivals = []
    else:
        rivals = [scores | {"y": replace(scores["y"], outcomes=None)} for scores in front]
    assert not racing.stops(candidate, rivals)


def test_nothing_stops_while_no_rival_is_above_the_reference_point(front):
    racing = Racing(DIRECTIONS, dict.fromkeys(DIRECTIONS, 0.99))
    assert not racing.stops(part(model(50, -0.3, -0.3), 1 / 4), front)


def test_what_was_measured_whole_does_not_stop(racing, front):
    assert not racing.stops(model(50, -0.3, -0.3), front)


def test_an_objective_known_whole_counts_with_its_value(front):
    """A size, say: it has no rows, and only it tells these two apart."""
    rivals = [scores | {"y": Score(value=0.9, examples=0)} for scores in front]
    racing = Racing(DIRECTIONS, REFERENCE)
    candidate = part(front[4], 1 / 4)
    assert racing.stops(candidate | {"y": Score(value=0.9, examples=0)}, rivals)
    assert not racing.stops(candidate | {"y": Score(value=1.5, examples=0)}, rivals)


@pytest.mark.parametrize("share", [1 / 16, 1 / 4])
def test_an_estimate_is_nearer_to_the_truth_than_the_rows_seen(share, racing, front):
    estimated, plain = [], []
    for i in range(40):
        truth = model(300 + i, 0.5, 0.7)
        seen = part(truth, share, i)
        told = racing.estimate(seen, front)
        estimated += [told[name].value - truth[name].value for name in truth]
        plain += [seen[name].value - truth[name].value for name in truth]
    assert np.std(estimated) < 0.85 * np.std(plain)


def test_an_estimate_says_which_rows_were_seen(racing, front):
    seen = part(model(50, 0, 0), 1 / 4)
    told = racing.estimate(seen, front)
    assert told["x"].rows.tolist() == seen["x"].rows.tolist()
    assert told["x"].examples == ROWS // 4


def test_an_estimate_without_rivals_is_the_value_of_the_rows_seen(racing):
    seen = part(model(50, 0, 0), 1 / 4)
    assert racing.estimate(seen, [])["x"].value == seen["x"].value


@pytest.mark.parametrize("share", [1 / 16, 1 / 8, 1 / 4, 1 / 2])
def test_predictions_err_as_much_as_they_say(share, front):
    rivals, errors = np.array([scores["x"].outcomes for scores in front], dtype=float), []
    for i in range(150):
        truth = model(400 + i, 0.6, 0)["x"].outcomes.astype(float)
        rows = np.random.default_rng(i).permutation(ROWS)[: round(share * ROWS)]
        mean, variance = predicted_mean(truth[rows], rows, rivals)
        errors.append((mean - truth.mean()) / variance**0.5)
    assert 0.75 < np.std(errors) < 1.25
    assert abs(np.mean(errors)) < 0.35


def test_all_rows_seen_leave_no_doubt():
    given = np.random.default_rng(0).random(10)
    assert predicted_mean(given, np.arange(10), np.ones((3, 10))) == (given.mean(), 0.0)
    assert predicted_share(given > 0.5, given - 0.5, np.arange(10), np.ones((3, 10))) == ((given > 0.5).mean(), 0.0)


def leads(count, ranks=6, noise=0.3):
    """Margins `(count, ROWS)` of models that differ in a few directions, as merges of the same parents do."""
    rng = np.random.default_rng(11)
    rows, models = rng.normal(size=(ranks, ROWS)), 0.3 * rng.normal(size=(count, ranks))
    return 0.5 + rows[0] + models @ rows + noise * rng.normal(size=(count, ROWS))


def predicted(margins, rivals, share, seed):
    """The errors of both predictions, each with the deviation that it tells."""
    rows = np.random.default_rng(seed).permutation(ROWS)[: round(share * ROWS)]
    right, others = (margins > 0).astype(float), rivals > 0
    told = predicted_share(right[rows], margins[rows], rows, rivals), predicted_mean(right[rows], rows, others.astype(float))
    return [(mean - right.mean(), variance**0.5) for mean, variance in told]


@pytest.mark.parametrize("share", [1 / 16, 1 / 8, 1 / 4])
def test_margins_tell_more_than_right_and_wrong(share):
    every = leads(60)
    found = np.array([predicted(each, every[:20], share, i) for i, each in enumerate(every[20:])])
    by_margins, by_outcomes = np.sqrt((found[..., 0] ** 2).mean(0))
    assert by_margins < 0.75 * by_outcomes


@pytest.mark.parametrize("share", [1 / 16, 1 / 8, 1 / 4, 1 / 2])
@pytest.mark.parametrize("rivals", [5, 20, 60])
def test_predictions_by_margins_err_as_much_as_they_say(share, rivals):
    every = leads(rivals + 100)
    found = np.array([predicted(each, every[:rivals], share, i)[0] for i, each in enumerate(every[rivals:])])
    assert 0.7 < np.sqrt(((found[:, 0] / found[:, 1]) ** 2).mean()) < 1.4


@pytest.mark.parametrize("share", [1 / 16, 1 / 8, 1 / 4, 1 / 2])
@pytest.mark.parametrize("rivals", [5, 20, 60])
def test_smoothed_predictions_err_as_much_as_they_say_and_less_than_others(share, rivals):
    every, found = leads(rivals + 100), []
    for i, each in enumerate(every[rivals:]):
        rows = np.random.default_rng(i).permutation(ROWS)[: round(share * ROWS)]
        mean, variance = predicted_share(smoothed(each)[rows], each[rows], rows, every[:rivals], smooth=True)
        hard, _ = predicted_share((each > 0)[rows], each[rows], rows, every[:rivals])
        found.append([mean - smoothed(each).mean(), variance**0.5, hard - (each > 0).mean()])
    errors, deviations, others = np.array(found).T
    assert 0.6 < np.sqrt(((errors / deviations) ** 2).mean()) < 1.4
    assert (errors**2).mean() < 0.6 * (others**2).mean()


def of_leads(*margins):
    return {
        name: Score(value=float((each > 0).mean()), examples=ROWS, outcomes=(each > 0).astype(np.float32), margins=each)
        for name, each in zip(DIRECTIONS, margins, strict=True)
    }


def test_an_estimate_expects_margins_of_all_rows_and_keeps_those_seen(racing):
    every = leads(22)
    rivals, truth = [of_leads(each, each) for each in every[:20]], of_leads(*every[20:])
    rows = np.random.default_rng(0).permutation(ROWS)[: ROWS // 8]
    seen = {n: replace(s, outcomes=s.outcomes[rows], margins=s.margins[rows], rows=rows) for n, s in truth.items()}
    for name, found in racing.estimate(seen, rivals).items():
        assert found.expected[rows].tolist() == truth[name].margins[rows].tolist()
        unseen = np.delete(np.arange(ROWS), rows)
        missed = found.expected[unseen] - truth[name].margins[unseen]
        assert missed.std() < 0.6 * (truth[name].margins - every[:20].mean(0))[unseen].std()


def test_without_margins_none_are_expected(racing, front):
    assert [s.expected for s in racing.estimate(part(front[3], 1 / 4), front).values()] == [None, None]


def test_where_outcomes_are_smoothed_the_rows_they_differ_on_come_first():
    every = leads(20)
    rivals = [of_leads(each, each) for each in every]
    found = Racing(DIRECTIONS, REFERENCE, smoothed=["x"]).priorities(rivals)
    assert found["x"] == pytest.approx(smoothed(every).var(0))
    assert found["y"] == pytest.approx((every > 0).var(0))


def test_without_margins_of_all_it_is_outcomes_that_count(racing, front):
    """Margins of the candidate alone say nothing."""
    seen = part(front[3], 1 / 4)
    alone = {name: replace(s, margins=s.outcomes - 0.5) for name, s in seen.items()}
    assert racing.estimate(alone, front)["x"].value == racing.estimate(seen, front)["x"].value
    rivals = [{name: replace(s, margins=s.outcomes - 0.5) for name, s in scores.items()} for scores in front]
    assert racing.estimate(alone, rivals)["x"].value != racing.estimate(seen, front)["x"].value


def test_rows_that_all_agree_so_far_leave_doubt(front):
    rivals = np.array([scores["x"].outcomes for scores in front], dtype=float)
    rows = np.flatnonzero(rivals.all(0))[:20]
    assert predicted_mean(np.ones(20), rows, rivals)[1] > 1e-4


def valued(scores, function):
    return {name: replace(s, value=function(float(s.outcomes.mean()))) for name, s in scores.items()}


def test_a_metric_that_follows_its_outcomes_is_estimated_in_its_own_unit(racing, front):
    """As perplexity follows the mean of the rows: not equal to it, but along a line over the rivals' range."""
    rivals = [valued(scores, lambda m: 100 + 50 * m) for scores in front]
    truth = model(70, 0.5, 0.5)
    told = racing.estimate(part(truth, 1 / 2), rivals)
    assert told["x"].value == pytest.approx(100 + 50 * truth["x"].value, abs=1.5)


def test_a_metric_that_does_not_follow_its_outcomes_stops_nothing(front):
    """One rival is better in x beyond doubt, and better in y than what is expected there; but in y anything may come."""
    scattered = (0.3, 0.8, 0.4, 0.7, 0.35, 0.75, 0.5, 0.6)
    rivals = [scores | {"y": replace(scores["y"], value=y)} for scores, y in zip(front, scattered, strict=True)]
    rivals.append(model(72, 1.6, 0.5) | {"y": Score(value=0.7, examples=ROWS)})
    racing = Racing(DIRECTIONS, REFERENCE, worth=0.1)
    assert not racing.stops(part(model(71, 0.9, 0.5), 1 / 2), rivals)


def test_the_rival_that_a_candidate_resembles_counts_most(front):
    rng = np.random.default_rng(3)
    rivals = np.array([front[0]["x"].outcomes, *(rng.random((6, ROWS)) < 0.5)], dtype=float)
    truth = np.where(rng.random(ROWS) < 0.03, 1 - rivals[0], rivals[0])
    told, plain = [], []
    for i in range(40):
        rows = np.random.default_rng(i).permutation(ROWS)[: ROWS // 4]
        told.append(predicted_mean(truth[rows], rows, rivals)[0] - truth.mean())
        plain.append(truth[rows].mean() - truth.mean())
    assert np.std(told) < 0.75 * np.std(plain)


def test_a_race_computes_no_round_after_the_one_in_which_it_stops(racing, front):
    asked = []

    def noted():
        for found in rounds(model(50, -0.3, -0.3)):
            asked.append(found)
            yield found

    _, stopped = race(noted(), racing, front)
    assert stopped
    assert len(asked) == 1


@pytest.mark.parametrize("worth", [-1, float("nan")])
def test_a_worth_that_makes_no_sense_is_refused(worth):
    with pytest.raises(ValueError, match="worth"):
        Racing(DIRECTIONS, REFERENCE, worth=worth)
