"""Where a model lives: a repository on the Hub at a revision, or a local folder; with an adapter on it, if there is one."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from hf_merge.errors import RecipeError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelRef:
    """A model by `id` (Hub repo_id `namespace/name`, or path of a local folder) and, on the Hub, its `revision`.

    `adapter` is a LoRA adapter that is added to it. Raises `RecipeError` for an id that is neither, or for a local folder with
    a revision.
    """

    id: str
    revision: str | None = None
    adapter: "ModelRef | None" = None

    def __post_init__(self) -> None:
        if self.is_local:
            if self.revision is not None:
                raise RecipeError(f"{self.id!r} is a local folder, and a folder has no revision {self.revision!r}.")
        elif not _REPO_ID.fullmatch(self.id) or ".." in self.id or "--" in self.id:
            raise RecipeError(
                f"{self.id!r} is neither a local folder nor a Hub id. Expected 'namespace/name', "
                "'namespace/name@revision', or the path of an existing folder."
            )

    @classmethod
    def parse(cls, text: "str | os.PathLike[str] | ModelRef") -> "ModelRef":
        """`namespace/name`, `namespace/name@revision` or a path, `model+adapter`; a `ModelRef` is returned as it is."""
        if isinstance(text, ModelRef):
            return text
        given = os.fspath(text)
        if _is_folder(given) and ("+" not in given or Path(given).expanduser().is_dir()):
            return cls(given)
        model, plus, adapter = given.rpartition("+")
        if plus:
            if not (model and adapter) or "+" in model:
                raise RecipeError(f"{given!r}: a model with an adapter is written model+adapter, with one of each.")
            return replace(cls.parse(model), adapter=cls.parse(adapter))
        name, _, revision = given.partition("@")
        return cls(name, revision or None)

    @property
    def plain(self) -> "ModelRef":
        """The model without its adapter."""
        return self if self.adapter is None else replace(self, adapter=None)

    @property
    def parts(self) -> "tuple[ModelRef, ...]":
        """The repositories or folders that it is read from: the model, and its adapter."""
        return (self,) if self.adapter is None else (self.plain, self.adapter)

    @property
    def is_local(self) -> bool:
        """Whether this is a folder on this machine."""
        return _is_folder(self.id)

    @property
    def path(self) -> Path:
        """The folder of a local model."""
        return Path(self.id).expanduser()

    @property
    def name(self) -> str:
        """The last part of the id: short enough for tables and parameter names."""
        return self.adapter.name if self.adapter else self._parts[-1]

    @property
    def long_name(self) -> str:
        """The last two parts of the id, and the revision: tells apart models of the same `name`."""
        if self.adapter:
            return f"{self.plain.long_name}+{self.adapter.long_name}"
        last_two = "/".join(self._parts[-2:])
        return f"{last_two}@{self.revision}" if self.revision else last_two

    @property
    def _parts(self) -> tuple[str, ...]:
        return Path(os.path.abspath(self.path)).parts if self.is_local else tuple(self.id.split("/"))

    def pinned(self, revision: str | None) -> "ModelRef":
        """The same model at the commit `revision` (a local folder has none)."""
        return self if self.is_local else replace(self, revision=revision)

    def __str__(self) -> str:
        plain = f"{self.id}@{self.revision}" if self.revision else self.id
        return f"{plain}+{self.adapter}" if self.adapter else plain


def _is_folder(text: str) -> bool:
    # An explicit path is local even when it does not exist, so that a typo is not looked up on the Hub.
    return text.startswith(("/", "./", "../", "~")) or text in (".", "..") or (text != "" and Path(text).is_dir())
