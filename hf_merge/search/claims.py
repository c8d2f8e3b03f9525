"""Which trial stands for which recipe, and which may be evaluated: the rule by which several workers share a study.

A trial declares its recipe (user attribute `digest`), waits until every lower-numbered running trial has declared its own, and
gives way to a lower-numbered trial of the same recipe, or to those that make up the budget. So no recipe runs twice, and the
budget is met exactly. It needs nothing of the storage but that trials get growing numbers, that what is written is seen, and
that a trial that has ended takes no more writes: then a worker that was taken for dead cannot add to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a study stands. Counts of recipes: those `evaluated`, those `claimed` (evaluated, running or queued), and of
    trials: those `queued` and `running`."""

    evaluated: int
    claimed: int
    queued: int
    running: int


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Whether a trial may be evaluated: not while it is `pending`, not if another with the number `repeat_of` stands for its
    recipe, not if the budget is spent (`over`)."""

    pending: bool = False
    repeat_of: int | None = None
    over: bool = False


def standing(stored: Sequence[FrozenTrial]) -> Standing:
    """Where a study with these trials stands."""
    counted = [t for t in holders(stored).values() if "known" not in t.user_attrs]
    queued = [t for t in stored if t.state == TrialState.WAITING]
    return Standing(
        evaluated=sum(t.state.is_finished() for t in counted),
        claimed=len(counted) + sum("digest" not in t.user_attrs for t in queued),
        queued=len(queued),
        running=sum(t.state == TrialState.RUNNING for t in stored),
    )


def claim(stored: Sequence[FrozenTrial], number: int, trials: int) -> Claim:
    """Whether the trial with this number, which has declared its recipe, may be evaluated in a budget of `trials`."""
    below, again, mine = stored[:number], queued_again(stored), stored[number].user_attrs
    if any(t.state == TrialState.RUNNING and "digest" not in t.user_attrs for t in below):
        return Claim(pending=True)
    same = holders(below, again).get(mine["digest"])
    if same is not None:
        return Claim(repeat_of=same.number)
    if "known" in mine:
        return Claim()
    # A recipe that was queued again keeps its place in the budget, though its new trial has a higher number.
    places = {t.user_attrs["digest"] for t in below if _counts(t) or t.number in again} - {mine["digest"]}
    undeclared = sum("digest" not in t.user_attrs for t in below if t.state == TrialState.WAITING)
    return Claim(over=len(places) + undeclared >= trials)


def holders(stored: Sequence[FrozenTrial], again: set[int] | None = None) -> dict[str, FrozenTrial]:
    """The trial that stands for each recipe, by digest: the first that has its outcome or is still to have it. Those queued
    `again` as another trial are not."""
    again = queued_again(stored) if again is None else again
    found: dict[str, FrozenTrial] = {}
    for trial in stored:
        digest = trial.user_attrs.get("digest")
        stands = _first_outcome(trial) if trial.state.is_finished() else trial.number not in again
        if digest is not None and digest not in found and stands:
            found[digest] = trial
    return found


def queued_again(stored: Sequence[FrozenTrial]) -> set[int]:
    """The numbers of trials whose recipe was queued again as another trial."""
    return {t.user_attrs["again"] for t in stored if "again" in t.user_attrs}


def has_outcome(stored: FrozenTrial) -> bool:
    """Whether it was scored or failed, and not cut off."""
    return "scores" in stored.user_attrs or "error" in stored.user_attrs


def _first_outcome(stored: FrozenTrial) -> bool:
    return has_outcome(stored) and "repeat_of" not in stored.user_attrs


def _counts(stored: FrozenTrial) -> bool:
    """Whether a recipe that has to be evaluated is, or will be, by this trial."""
    if "digest" not in stored.user_attrs or "known" in stored.user_attrs:
        return False
    return not stored.state.is_finished() or _first_outcome(stored)
