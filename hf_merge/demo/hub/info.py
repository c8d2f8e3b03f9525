"""What the API tells about repositories and files, as JSON values."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

import yaml

from hf_merge.demo.hub.cards import front_matter, strings
from hf_merge.demo.hub.names import is_repo_id
from hf_merge.demo.hub.objects import FileEntry, pointer
from hf_merge.demo.hub.refusal import bad_request, no_such_entry
from hf_merge.demo.hub.store import Commit, Repository

_HEADER_LIMIT = 100_000_000
# The facts of a commit never change, and reading them costs several files.
_facts_by_commit: dict[tuple[str, str], dict[str, Any]] = {}


def file_json(path: str, entry: FileEntry, *, xet_hash: bool = False) -> dict[str, Any]:
    """A file of a tree. `xet_hash` is what clients need to copy LFS files between repositories."""
    result: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
    if entry.sha256:
        size = len(pointer(entry.sha256, entry.size))
        result["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": size}
        if xet_hash:
            result["xetHash"] = entry.sha256
    return result


def folder_json(path: str, commit: Commit) -> dict[str, Any]:
    """A folder of a tree; its id follows from its contents."""
    digest = hashlib.sha1()
    for name, entry in commit.files.items():
        if name.startswith(f"{path}/"):
            digest.update(f"{name}\0{entry.oid}\0".encode())
    return {"type": "directory", "path": path, "size": 0, "oid": digest.hexdigest()}


def folders_of(paths: Iterable[str]) -> set[str]:
    """All folders above these files."""
    return {str(folder) for path in paths for folder in list(PurePosixPath(path).parents)[:-1]}


def tree_json(commit: Commit, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """The entries below a folder ("" for the root), folders first; refuses an absent folder with 404."""
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    files = [path for path in commit.files if path.startswith(prefix)]
    if prefix and not files:
        raise no_such_entry(folder, commit.sha)
    folders = [path for path in folders_of(files) if path.startswith(prefix) and path != prefix[:-1]]
    if not recursive:
        files = [path for path in files if "/" not in path[len(prefix) :]]
        folders = [path for path in folders if "/" not in path[len(prefix) :]]
    return [folder_json(path, commit) for path in sorted(folders)] + [file_json(path, commit.files[path]) for path in files]


def add_last_commits(repository: Repository, commit: Commit, entries: list[dict[str, Any]]) -> None:
    """Set `lastCommit` of each entry: the newest commit that changed it."""
    history = list(repository.history(commit.sha))
    for entry in entries:
        prefix = f"{entry['path']}/"
        for position, candidate in enumerate(history):
            older = history[position + 1].files if position + 1 < len(history) else {}
            changed = {*candidate.files.items()} ^ {*older.items()}
            if any(path == entry["path"] or path.startswith(prefix) for path, _ in changed):
                entry["lastCommit"] = {"id": candidate.sha, "title": candidate.title, "date": candidate.date}
                break


def repository_json(repository: Repository, revision: str, *, blobs: bool = False) -> dict[str, Any]:
    """Everything the Hub tells about a repository at a revision."""
    state = repository.state()
    result: dict[str, Any] = {
        "_id": hashlib.md5(repository.url_path.encode(), usedforsecurity=False).hexdigest()[:24],
        "id": repository.repo_id,
        "author": repository.namespace,
        "private": state.private,
        "gated": "auto" if state.gated else False,
        "disabled": False,
        "createdAt": state.created,
        "downloads": 0,
        "likes": 0,
    }
    if repository.kind == "models":
        result["modelId"] = repository.repo_id
    if not state.refs:
        return {**result, "lastModified": state.created, "siblings": [], "tags": []}
    commit = repository.commit_at(revision)
    result |= {"sha": commit.sha, "lastModified": commit.date, "siblings": _siblings(commit, blobs=blobs)}
    result["usedStorage"] = sum(entry.size for entry in commit.files.values())
    if repository.kind == "spaces":
        result |= {"sdk": state.space.get("sdk"), "runtime": {"stage": "NO_APP_FILE", "hardware": {}}}
    key = (str(repository.folder), commit.sha)
    if key not in _facts_by_commit:
        if len(_facts_by_commit) >= 1000:
            _facts_by_commit.clear()
        _facts_by_commit[key] = _facts(repository, commit)
    return result | _facts_by_commit[key]


def _siblings(commit: Commit, *, blobs: bool) -> list[dict[str, Any]]:
    if not blobs:
        return [{"rfilename": path} for path in commit.files]
    result = []
    for path, entry in commit.files.items():
        sibling: dict[str, Any] = {"rfilename": path, "size": entry.size, "blobId": entry.oid}
        if entry.sha256:
            size = len(pointer(entry.sha256, entry.size))
            sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": size}
        result.append(sibling)
    return result


def _facts(repository: Repository, commit: Commit) -> dict[str, Any]:
    card = _card(repository, commit)
    config = _json_file(repository, commit, "config.json")
    facts: dict[str, Any] = {"cardData": card} if card else {}
    if repository.kind != "models":
        return facts | {"tags": _tags(card, config, commit)}
    shown: dict[str, Any] = {key: config[key] for key in ("architectures", "model_type") if key in config}
    if adapter := _json_file(repository, commit, "adapter_config.json"):
        shown["peft"] = {key: adapter[key] for key in ("base_model_name_or_path", "task_type") if key in adapter}
    if shown:
        facts["config"] = shown
    library = card.get("library_name") or _library(commit, config)
    facts |= {"tags": _tags({**card, "library_name": library}, config, commit), "library_name": library}
    if "pipeline_tag" in card:
        facts["pipeline_tag"] = card["pipeline_tag"]
    if "model-index" in card:
        facts["model-index"] = card["model-index"]
    if bases := strings(card.get("base_model")):
        facts["baseModels"] = {"relation": _relation(card, commit), "models": [{"id": base} for base in bases]}
    if results := _evaluation_results(repository, commit):
        facts["evalResults"] = results
    if headers := safetensors_headers(repository, commit):
        facts["safetensors"] = _parameters(headers.values())
    return facts


def _card(repository: Repository, commit: Commit) -> dict[str, Any]:
    entry = commit.files.get("README.md")
    if entry is None:
        return {}
    try:
        return front_matter(repository.content(entry).read_text("utf-8")) or {}
    except ValueError:
        return {}


def _json_file(repository: Repository, commit: Commit, path: str) -> dict[str, Any]:
    entry = commit.files.get(path)
    if entry is None:
        return {}
    try:
        content = json.loads(repository.content(entry).read_bytes())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _library(commit: Commit, config: dict[str, Any]) -> str | None:
    if "adapter_config.json" in commit.files:
        return "peft"
    return "transformers" if "model_type" in config else None


def _relation(card: dict[str, Any], commit: Commit) -> str:
    if "adapter_config.json" in commit.files:
        return "adapter"
    return str(card.get("base_model_relation") or ("merge" if len(strings(card.get("base_model"))) > 1 else "finetune"))


def _tags(card: dict[str, Any], config: dict[str, Any], commit: Commit) -> list[str]:
    tags = [*strings(card.get("library_name")), *strings(card.get("pipeline_tag")), *strings(config.get("model_type"))]
    if any(path.endswith(".safetensors") for path in commit.files):
        tags.append("safetensors")
    tags += strings(card.get("tags")) + strings(card.get("language"))
    tags += [f"dataset:{name}" for name in strings(card.get("datasets"))]
    for base in strings(card.get("base_model")):
        tags += [f"base_model:{base}", f"base_model:{_relation(card, commit)}:{base}"]
    tags += [f"license:{name}" for name in strings(card.get("license"))]
    return list(dict.fromkeys([*tags, "region:us"]))


def _evaluation_results(repository: Repository, commit: Commit) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for path, entry in commit.files.items():
        if not path.startswith(".eval_results/") or not path.endswith((".yaml", ".yml")):
            continue
        try:
            items = yaml.safe_load(repository.content(entry).read_bytes())
        except yaml.YAMLError as error:
            results.append({"filename": path, "error": str(error)})
            continue
        results += [{"filename": path, **item} for item in items or [] if isinstance(item, dict)]
    return results


def safetensors_headers(repository: Repository, commit: Commit) -> dict[str, dict[str, Any]]:
    """The headers of `model.safetensors` or its shards; files that are not valid safetensors are left out."""
    headers = {}
    for path, entry in commit.files.items():
        if not path.startswith("model") or not path.endswith(".safetensors") or "/" in path:
            continue
        with repository.content(entry).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if length <= min(_HEADER_LIMIT, entry.size) else b""
        try:
            headers[path] = json.loads(raw)
        except ValueError:
            continue
    return headers


def safetensors_json(repository: Repository, commit: Commit, path: str) -> dict[str, Any]:
    """The headers of all shards in one answer, and the index without its weight map."""
    index = _json_file(repository, commit, path)
    if path not in commit.files:
        raise no_such_entry(path, commit.sha)
    if not isinstance(index.get("weight_map"), dict):
        raise bad_request(f"{path!r} is not a safetensors index")
    shards = set(index["weight_map"].values())
    headers = {name: header for name, header in safetensors_headers(repository, commit).items() if name in shards}
    return {"index": {"metadata": index.get("metadata")}, "headers": headers}


def _parameters(headers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    count: dict[str, int] = {}
    for header in headers:
        for name, tensor in header.items():
            if name == "__metadata__" or not isinstance(tensor, dict):
                continue
            size = 1
            for dimension in tensor.get("shape", []):
                size *= dimension
            dtype = str(tensor.get("dtype"))
            count[dtype] = count.get(dtype, 0) + size
    return {"parameters": count, "total": sum(count.values())}


def only(info: dict[str, Any], properties: list[str]) -> dict[str, Any]:
    """The properties that the client asked for with `expand`, all if it asked for none."""
    if not properties:
        return info
    return {key: value for key, value in info.items() if key in {"_id", "id", *properties}}


def matches(info: dict[str, Any], *, filters: list[str], search: list[str], author: str | None) -> bool:
    """Whether a repository belongs into a list."""
    tags = set(info["tags"])
    wanted = {part for text in filters for part in text.split(",") if part}
    name = info["id"].lower()
    return wanted <= tags and all(text.lower() in name for text in search) and author in (None, info["id"].split("/")[0])


def is_collectible(item_type: object, item_id: object) -> bool:
    """Whether something of this type and name may stand in a collection."""
    if item_type in ("model", "dataset", "space"):
        return is_repo_id(item_id)
    return item_type in ("paper", "collection", "bucket") and isinstance(item_id, str)
