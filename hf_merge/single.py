"""One merge of one written recipe: checked from headers, streamed, and written to a folder or straight to the Hub."""

import errno
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import HfApi

from hf_merge.cache import cache_folder
from hf_merge.checkpoints.checkpoint import hub_api
from hf_merge.checkpoints.companions import companion_files
from hf_merge.checkpoints.index import INDEX, read_index
from hf_merge.checkpoints.local import LocalFiles
from hf_merge.checkpoints.writer import Shard, bytes_of, index_json
from hf_merge.errors import MergeError, RecipeError
from hf_merge.merging.architecture import auto_class
from hf_merge.merging.execute import OPEN_SHARDS, execute
from hf_merge.merging.plan import MergePlan, open_inputs, plan
from hf_merge.merging.processes import gathered, processes, told
from hf_merge.merging.verify import has_the_primarys_layout, verify
from hf_merge.publishing.card import RECIPE_FILE, render
from hf_merge.publishing.facts import CardFacts
from hf_merge.publishing.license import licenses_of
from hf_merge.publishing.push import ShardUpload, check_writable
from hf_merge.publishing.resume import PushState
from hf_merge.recipes import yaml
from hf_merge.recipes.recipe import Recipe
from hf_merge.search.trial import Trial
from hf_merge.version import __version__

MARKER = ".hf_merge.json"
"""Stands in a folder as long as the merge into it is not finished; says which one it is."""
PUSHES = "pushes"
"""Folder of the cache for merges on their way to the Hub: what was uploaded, and the shards under way."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Where a merge went (`where`: a folder or an address on the Hub), what was done and how long it took in seconds."""

    where: str
    plan: MergePlan = field(repr=False)
    seconds: float


def check(recipe: Recipe | Path | str, *, pickles: bool = False, token: str | bool | None = None) -> MergePlan:
    """What a merge would read, merge and write, from headers and configs alone: `print` it, or look at it.

    `recipe` may be a `Recipe` or the path of a YAML file. Raises `RecipeError`, `CheckpointError` or `MergeError` with every
    mismatch between the models, or if transformers could not load the result.
    """
    api = hub_api(token)
    compiled = _plan(_recipe(recipe), api, "5GB", pickles)
    verify(compiled)
    return replace(compiled, licenses=licenses_of(compiled.recipe.inputs, api))


def merge(
    recipe: Recipe | Path | str,
    out: Path | str | None = None,
    *,
    push_to: str | None = None,
    private: bool | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    max_memory: int | str | None = None,
    pickles: bool = False,
    consent: bool = False,
    token: str | bool | None = None,
    progress: bool = True,
) -> Merged:
    """Merge a recipe into the folder `out`, or straight to the Hub repository `push_to`, in bounded memory.

    Sources on the Hub are read by ranges and never stored. The result is sharded safetensors with index, config, tokenizer,
    recipe.yaml and a model card. A merge that was cut off goes on when it is called again. `max_memory` ("500MB") bounds the
    source tensors in memory at once, and changes no bit of the result. `pickles` reads pickled weights, without running code,
    where there are no safetensors. `consent` agrees to publish under
    parents' licenses that forbid commercial use or derived works. Raises `RecipeError`, `CheckpointError` and `MergeError`
    before any tensor is read, `PublishError` if the repository cannot be written, and `MergeError` for values that are not
    finite.
    """
    if (out is None) == (push_to is None):
        raise RecipeError("Give either `out`, a folder, or `push_to`, a repository on the Hub.")
    started, api, found = time.monotonic(), hub_api(token), _recipe(recipe)
    if push_to is not None:
        push_to = check_writable(push_to, api, private=private)
    memory = None if max_memory is None else bytes_of(max_memory, "max_memory")
    compiled = _plan(found, api, max_shard_size, pickles)
    if not has_the_primarys_layout(compiled):
        verify(compiled)
    name = push_to or Path(str(out)).expanduser().resolve().name
    # A folder of one's own is not a publication: there the card says what the licenses ask, and refuses nothing.
    consent = consent or push_to is None
    facts = card_facts(compiled, Trial(number=0, recipe=compiled.recipe), name, api, consent=consent)
    files = {"README.md": str(render(facts)).encode()}
    if push_to is not None:
        where = merge_to_hub(compiled, push_to, files, api, private=private, max_memory=memory, progress=progress)
    else:
        folder = Path(str(out))
        where = str(merge_to_folder(compiled, folder, files, overwrite=overwrite, max_memory=memory, progress=progress))
    return Merged(where=where, plan=compiled, seconds=time.monotonic() - started)


def merge_to_folder(
    compiled: MergePlan,
    folder: Path,
    files: Mapping[str, bytes],
    *,
    overwrite: bool = False,
    max_memory: int | None = None,
    progress: bool = True,
) -> Path:
    """Carry out a plan into `folder`, with `files` beside the weights. Raises `MergeError` if it holds anything else."""
    state, folder = processes(), folder.expanduser()
    with _written(folder):
        if state.is_main_process:
            _prepare(folder, compiled, overwrite)
        state.wait_for_everyone()
        execute(compiled, folder, skip=lambda shard: _is_whole(folder, shard), max_memory=max_memory, progress=progress)
        if state.is_main_process:
            for name, data in {**result_files(compiled), **files}.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(data)
            _check_written(folder, compiled)
            (folder / MARKER).unlink()
        state.wait_for_everyone()
    return folder


def merge_to_hub(
    compiled: MergePlan,
    repo_id: str,
    files: Mapping[str, bytes],
    api: HfApi,
    *,
    private: bool | None = None,
    message: str | None = None,
    max_memory: int | None = None,
    progress: bool = True,
) -> str:
    """Carry out a plan into a repository: every shard is uploaded and dropped as soon as it is whole, one commit at the end.

    A push that was cut off goes on when it is done again; several processes share the shards, and the main one commits.
    """
    state, pushed = processes(), PushState(cache_folder(PUSHES), str(api.endpoint), repo_id, _mark(compiled))
    with _written(pushed.folder), pushed.scratch(state.process_index) as folder:
        _check_room(folder, [shard.nbytes for shard in compiled.shards if pushed.noted(shard.name) is None])
        upload = ShardUpload(api, repo_id, private=private, state=pushed)
        execute(
            compiled,
            folder,
            finished=upload.add_shard,
            skip=lambda shard: upload.has(shard.name, shard.nbytes),
            max_memory=max_memory,
            progress=progress,
        )
        shards, where = gathered(state, upload.finished()), ""
        if state.is_main_process:
            everything = {**result_files(compiled), **files}
            where = str(upload.commit(everything, message or f"Merge with {compiled.method.title}", also=shards))
        where = told(state, where)
    state.wait_for_everyone()
    pushed.remove()
    return where


def result_files(compiled: MergePlan) -> dict[str, bytes]:
    """The small files of a result: companions of the primary model, the shards' index, the pinned recipe."""
    found = companion_files(compiled.primary, compiled.dtype, compiled.config)
    if compiled.vocabulary:
        found = compiled.vocabulary.companions(found)
    index = index_json(list(compiled.shards))
    return found | ({INDEX: index} if index else {}) | {RECIPE_FILE: yaml.dumps(compiled.recipe).encode()}


def card_facts(compiled: MergePlan, trial: Trial, repo_id: str, api: HfApi, **more: object) -> CardFacts:
    """What a card says of any merge: licenses, the class that loads it, versions; `more` is what else there is to say."""
    loaded_by, tag = auto_class(compiled.primary.config)
    return CardFacts(
        repo_id=repo_id,
        trial=trial,
        licenses=licenses_of(compiled.recipe.inputs, api),
        auto_class=loaded_by,
        pipeline_tag=tag,
        versions={name: version(name) for name in ("hf_merge", "torch", "transformers")},
        **more,  # type: ignore[arg-type]
    )


def _recipe(recipe: Recipe | Path | str) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else yaml.load(recipe)


def _plan(recipe: Recipe, api: HfApi, max_shard_size: int | str, pickles: bool) -> MergePlan:
    return plan(recipe, open_inputs(recipe, api, pickles=pickles), max_shard_size=max_shard_size)


def _prepare(folder: Path, compiled: MergePlan, overwrite: bool) -> None:
    """Leave the folder with our marker and nothing but finished shards of this same merge."""
    marker, mark = folder / MARKER, _mark(compiled)
    if any(checkpoint.ref.is_local and checkpoint.ref.path.resolve() == folder.resolve() for checkpoint in compiled.inputs):
        raise MergeError(f"{folder} is one of the models that are merged. Give another folder.")
    if folder.exists() and any(folder.iterdir()) and not marker.is_file() and not overwrite:
        raise MergeError(
            f"{folder} is not empty. Give another folder, or `overwrite=True` (--overwrite) to replace what it holds."
        )
    folder.mkdir(parents=True, exist_ok=True)
    stale = list(folder.glob(".model*.part"))
    if not marker.is_file() or marker.read_text() != mark:
        stale += [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    needed = sum(shard.nbytes for shard in compiled.shards if folder / shard.name in stale or not _is_whole(folder, shard))
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in stale)
    if free < needed:
        raise MergeError(f"The result needs {needed:,} bytes, and {folder} has {free:,} left.")
    for path in stale:
        path.unlink()
    marker.write_text(mark)


def _check_room(folder: Path, shards: Sequence[int]) -> None:
    """Refuse a push that would run out of disk in the middle. Shards of these sizes pass through `folder`, a few at a time."""
    needed, free = sum(sorted(shards)[-OPEN_SHARDS:]), shutil.disk_usage(folder).free
    if free < needed:
        raise MergeError(
            f"{OPEN_SHARDS} shards at a time need {needed:,} bytes of disk, and {folder} has {free:,} left: give a smaller "
            "max_shard_size (--max-shard-size), or set HF_MERGE_CACHE to a folder with more room."
        )


def _mark(compiled: MergePlan) -> str:
    """What tells a merge from every other whose shards could lie in its folder."""
    local = [checkpoint for checkpoint in (*compiled.inputs, *compiled.adapters) if checkpoint.ref.is_local]
    files = [c.ref.path / file for c in local for file in sorted({entry.file for entry in c.index.tensors.values()})]
    content = {
        "hf_merge": __version__,
        "digest": compiled.recipe.digest,
        "shards": {shard.name: shard.nbytes for shard in compiled.shards},
        "changed": {str(file): file.stat().st_mtime_ns for file in files},
    }
    return json.dumps(content)


def _check_written(folder: Path, compiled: MergePlan) -> None:
    """Read the result's headers back: they promise the tensors of the plan, which is known to load."""
    written = read_index(LocalFiles(folder)).tensors
    found = {name: (entry.shape, entry.dtype) for name, entry in written.items()}
    if found != {name: (job.spec.shape, job.spec.dtype) for name, job in compiled.jobs.items()}:
        raise MergeError(f"{folder} does not hold what was merged: has another process written there? Merge again.")


def _is_whole(folder: Path, shard: Shard) -> bool:
    path = folder / shard.name
    return path.is_file() and path.stat().st_size == shard.nbytes


@contextmanager
def _written(where: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError) as error:
        if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
            raise MergeError("Memory ran out: give a smaller max_memory (--max-memory).") from error
        raise MergeError(f"{where} cannot be written: {error}") from error
