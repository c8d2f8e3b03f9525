"""The progress bar of a search."""

from collections.abc import Mapping, Sequence

from tqdm.auto import tqdm

from hf_merge.scores import MAXIMIZE
from hf_merge.search.trial import Front, Trial


class Progress:
    """A bar over evaluations: how many of how many, time left, the front's size and hypervolume, the best of each objective."""

    def __init__(self, trials: int, evaluated: int, directions: Mapping[str, str], *, shown: bool) -> None:
        self.directions = directions
        self.bar = tqdm(total=trials, initial=evaluated, desc="Search", unit="recipe", disable=not shown)

    def show(self, trials: Sequence[Trial], reference: Mapping[str, float], *, advance: bool) -> None:
        """Redraws the bar for all trials so far."""
        if self.bar.disable:
            return
        front = Front.of(trials, self.directions, reference)
        if front:
            best = {
                name: (max if d == MAXIMIZE else min)(t.scores[name].value for t in front)
                for name, d in self.directions.items()
            }
            words = [
                f"front {len(front)}",
                f"hypervolume {front.hypervolume():.4g}",
                *(f"{k} {v:.4g}" for k, v in best.items()),
            ]
            self.bar.set_postfix_str(", ".join(words), refresh=False)
        self.bar.update(int(advance))

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
