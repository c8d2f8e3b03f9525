"""The progress bar of a search."""

from collections.abc import Mapping, Sequence

from tqdm.auto import tqdm

from hf_merge.scores import MAXIMIZE
from hf_merge.search.trial import Front, Trial


class Progress:
    """A bar over the whole study's evaluations, whoever made them: how many of how many, time left, how many workers there
    are, the front's size and hypervolume, the best of each objective."""

    def __init__(
        self,
        trials: int,
        evaluated: int,
        directions: Mapping[str, str],
        *,
        shown: bool,
        desc: str = "Search",
        unit: str = "recipe",
    ) -> None:
        self.directions = directions
        self.bar = tqdm(total=trials, initial=evaluated, desc=desc, unit=unit, disable=not shown)

    @property
    def shown(self) -> bool:
        """Whether there is a bar to draw."""
        return not self.bar.disable

    def show(self, trials: Sequence[Trial], reference: Mapping[str, float], *, evaluated: int, running: int = 1) -> None:
        """Redraws the bar for all trials so far, `evaluated` of which count, while `running` ones are evaluated."""
        if not self.shown:
            return
        front = Front.of(trials, self.directions, reference)
        words = [f"{running} workers"] if running > 1 else []
        if front:
            best = {
                name: (max if d == MAXIMIZE else min)(t.scores[name].value for t in front)
                for name, d in self.directions.items()
            }
            words += [
                f"front {len(front)}",
                f"hypervolume {front.hypervolume():.4g}",
                *(f"{k} {v:.4g}" for k, v in best.items()),
            ]
        elif front.nearest is not None:
            words.append("no recipe keeps the constraints yet")
        self.bar.set_postfix_str(", ".join(words), refresh=False)
        if evaluated > self.bar.n:
            self.bar.update(evaluated - self.bar.n)
        else:
            self.bar.refresh()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
