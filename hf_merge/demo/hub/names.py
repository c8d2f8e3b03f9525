"""What repositories, files and revisions may be called. All names that arrive are hostile until checked here."""

import re

from hf_merge.demo.hub.refusal import Refusal, bad_request, no_such_repository

KINDS = ("models", "datasets", "spaces")
RESERVED = {"api", "datasets", "spaces", "models", "collections", "_local", "_lfs"}
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_SHA = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REF = re.compile(r"[^\x00-\x20\x7f~^:?*\[\\]{1,200}")


def kind_of(repo_type: object) -> str:
    """`model` (also None), `dataset` or `space` as it stands in `/api/...`: with an s."""
    kind = f"{repo_type or 'model'}s"
    if kind not in KINDS:
        raise bad_request(f"Unknown repository type {repo_type!r}; known: model, dataset, space")
    return kind


def is_repo_id(repo_id: object) -> bool:
    """Whether this is `namespace/name` as the Hub allows it; such an id is also a safe relative path."""
    if not isinstance(repo_id, str) or repo_id.count("/") != 1:
        return False
    namespace, name = repo_id.split("/")
    good = all(_PART.fullmatch(part) and ".." not in part and "--" not in part for part in (namespace, name))
    return good and namespace not in RESERVED and not name.endswith(".git")


def check_new_repo_id(repo_id: str) -> str:
    """Return the id, or refuse it with 400."""
    if not is_repo_id(repo_id):
        raise bad_request(f"Invalid repository id {repo_id!r}: expected namespace/name of letters, digits, '-_.'")
    return repo_id


def check_repo_id(repo_id: str) -> str:
    """Return the id of a repository that may exist, or refuse it with 404."""
    if not is_repo_id(repo_id):
        raise no_such_repository(repo_id)
    return repo_id


def check_path(path: object) -> str:
    """Return the path of a file to be written: relative, with forward slashes and no dots as components."""
    if not isinstance(path, str) or not path or len(path) > 1024:
        raise bad_request(f"Invalid file path {path!r}")
    for part in path.split("/"):
        if part in ("", ".", "..", ".git") or "\\" in part or any(ord(char) < 32 for char in part) or len(part) > 255:
            raise bad_request(f"Invalid file path {path!r}: {part!r} cannot be a part of it")
    return path


def check_ref(name: object) -> str:
    """Return the name of a branch or tag to be created."""
    bad = (
        not isinstance(name, str)
        or not _REF.fullmatch(name)
        or ".." in name
        or name.startswith(("/", "-", ".", "refs/"))
        or name.endswith(("/", ".", ".lock"))
        or "//" in name
        or _SHA.fullmatch(name)
    )
    if bad or not isinstance(name, str):
        raise Refusal(400, f"Invalid reference name {name!r}")
    return name


def is_sha(text: str) -> bool:
    """Whether this is a full commit id."""
    return bool(_SHA.fullmatch(text))


def is_sha256(text: object) -> bool:
    """Whether this is the id of an LFS object."""
    return isinstance(text, str) and bool(_SHA256.fullmatch(text))
