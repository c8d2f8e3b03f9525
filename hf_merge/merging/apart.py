"""Models of several depths, which have no merge, where a search expects merges."""

from transformers import PreTrainedModel

from hf_merge.errors import MergeError
from hf_merge.merging.path_model import PathModel
from hf_merge.recipes.recipe import Recipe


class Apart:
    """Models of several depths in memory, one at a time: in place of a `LiveModel`, where there is nothing to merge."""

    def __init__(self, pool: PathModel) -> None:
        self.pool = pool

    @property
    def model(self) -> PreTrainedModel:
        """What was loaded last."""
        return self.pool.model

    def load(self, recipe: Recipe) -> None:
        """Become the model that `recipe` has alone. Raises `MergeError` for a merge."""
        if len(recipe.models) > 1:
            raise MergeError("Models of several depths have no merge: a path takes their layers as they are.")
        self.pool.take(self.pool.identity(recipe.models[0].name))

    def distance(self, recipe: Recipe) -> float:
        """Raises `MergeError`: there is none between models of several depths."""
        raise MergeError("There is no distance between models of several depths.")
