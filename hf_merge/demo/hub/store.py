"""Repositories on disk: commits, references and contents, written so that a killed server loses nothing it confirmed.

    repos/<kind>/<namespace>/<name>/repo.json        privacy, dates, references (replaced as a whole)
                                    commits/<sha>    one JSON file a commit, never changed
                                    objects/..       contents by hash
    locks/  tmp/  secret  collections.json

Several processes may share a root: writers lock, readers look at the date of `repo.json`.
"""

import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from hf_merge.demo.hub.names import KINDS, check_path, check_ref, check_repo_id, is_repo_id, is_sha
from hf_merge.demo.hub.objects import FileEntry, Objects
from hf_merge.demo.hub.refusal import Refusal, bad_request, no_such_entry, no_such_repository, no_such_revision

_STALE = 3600.0


@dataclass(frozen=True, slots=True)
class Commit:
    """One state of a repository; `files` maps path to entry and is never changed."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, FileEntry]


@dataclass(frozen=True, slots=True)
class State:
    """What `repo.json` holds; `refs` maps full names (`refs/heads/main`, `refs/tags/v1`, `refs/pr/1`) to shas."""

    created: str
    private: bool = False
    gated: bool = False
    refs: Mapping[str, str] = field(default_factory=dict)
    space: Mapping[str, Any] = field(default_factory=dict)


def now() -> str:
    """The time as the Hub writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Store:
    """All repositories under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._repositories: dict[tuple[str, str], Repository] = {}
        for folder in ("repos", "locks", "tmp"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)

    def temporary(self) -> Path:
        """A fresh path on the same file system, to be renamed into place."""
        return self.root / "tmp" / uuid.uuid4().hex

    def sweep(self) -> None:
        """Remove what interrupted uploads left behind."""
        for path in (self.root / "tmp").iterdir():
            if time.time() - path.stat().st_mtime > _STALE:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def write(self, path: Path, content: bytes) -> None:
        """Write a small file atomically."""
        temporary = self.temporary()
        temporary.write_bytes(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, path)

    def lock(self, name: str) -> FileLock:
        """A lock between threads and processes."""
        return FileLock(self.root / "locks" / f"{name}.lock", thread_local=False)

    def _folder(self, kind: str, repo_id: str) -> Path:
        return self.root / "repos" / kind / check_repo_id(repo_id)

    def get(self, kind: str, repo_id: str) -> "Repository":
        """The repository; refuses with 404 if there is none."""
        folder = self._folder(kind, repo_id)
        if not (folder / "repo.json").is_file():
            self._repositories.pop((kind, repo_id), None)
            raise no_such_repository(repo_id)
        repository = self._repositories.get((kind, repo_id))
        if repository is None:
            repository = self._repositories[kind, repo_id] = Repository(self, kind, repo_id, folder)
        return repository

    def exists(self, kind: str, repo_id: str) -> bool:
        """Whether there is such a repository."""
        return is_repo_id(repo_id) and (self._folder(kind, repo_id) / "repo.json").is_file()

    def create(self, kind: str, repo_id: str, state: State | None = None) -> "Repository":
        """A repository without commits; refuses with 409 if it exists."""
        with self.lock(f"{kind}--{repo_id.replace('/', '--')}"):
            if self.exists(kind, repo_id):
                raise Refusal(409, f"You already created this {kind[:-1]} repo: {repo_id}")
            self.write(self._folder(kind, repo_id) / "repo.json", json.dumps(asdict(state or State(created=now()))).encode())
        return self.get(kind, repo_id)

    def delete(self, kind: str, repo_id: str) -> None:
        """Remove a repository at once; its disk space follows."""
        repository = self.get(kind, repo_id)
        with repository.lock():
            grave = self.temporary()
            os.replace(repository.folder, grave)
        shutil.rmtree(grave, ignore_errors=True)

    def move(self, kind: str, old: str, new: str) -> None:
        """Rename a repository."""
        repository = self.get(kind, old)
        if self.exists(kind, new):
            raise Refusal(409, f"A {kind[:-1]} repo named {new} already exists")
        target = self._folder(kind, new)
        target.parent.mkdir(parents=True, exist_ok=True)
        with repository.lock():
            os.replace(repository.folder, target)

    def duplicate(self, kind: str, source: str, target: str, *, private: bool) -> "Repository":
        """Copy a repository with its history."""
        repository = self.get(kind, source)
        if self.exists(kind, target):
            raise Refusal(409, f"A {kind[:-1]} repo named {target} already exists")
        copy = self.temporary()
        with repository.lock():
            shutil.copytree(repository.folder, copy, copy_function=_link_or_copy)
        state = replace(repository.state(), created=now(), private=private, gated=False)
        self.write(copy / "repo.json", json.dumps(asdict(state)).encode())
        folder = self._folder(kind, target)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(copy, folder)
        return self.get(kind, target)

    def all(self, *kinds: str) -> Iterator["Repository"]:
        """The repositories of these kinds, of all kinds if none is named."""
        for kind in kinds or KINDS:
            for path in sorted((self.root / "repos" / kind).glob("*/*/repo.json")):
                yield self.get(kind, f"{path.parent.parent.name}/{path.parent.name}")


class Repository:
    """One repository. Reading is safe in any thread; writing takes the lock."""

    def __init__(self, store: Store, kind: str, repo_id: str, folder: Path) -> None:
        self.store = store
        self.kind = kind
        self.repo_id = repo_id
        self.folder = folder
        self.objects = Objects(folder / "objects", store.temporary)
        self._state: tuple[tuple[int, int], State] | None = None
        self._commits: dict[str, Commit] = {}
        self._guard = threading.Lock()

    @property
    def namespace(self) -> str:
        """Who owns it."""
        return self.repo_id.partition("/")[0]

    @property
    def url_path(self) -> str:
        """The id with the prefix that addresses outside `/api` have."""
        return self.repo_id if self.kind == "models" else f"{self.kind}/{self.repo_id}"

    def lock(self) -> FileLock:
        """The lock of this repository."""
        return self.store.lock(f"{self.kind}--{self.repo_id.replace('/', '--')}")

    def state(self) -> State:
        """The state on disk, read again only if another writer has replaced it."""
        path = self.folder / "repo.json"
        try:
            stat = path.stat()
            version = (stat.st_mtime_ns, stat.st_ino)
            cached = self._state
            if cached is None or cached[0] != version:
                cached = self._state = (version, State(**json.loads(path.read_bytes())))
        except FileNotFoundError:
            raise no_such_repository(self.repo_id) from None
        return cached[1]

    def _write_state(self, state: State) -> None:
        self.store.write(self.folder / "repo.json", json.dumps(asdict(state)).encode())

    def update(self, **changes: Any) -> None:
        """Change privacy, gating or the Space's settings."""
        with self.lock():
            self._write_state(replace(self.state(), **changes))

    def resolve(self, revision: str) -> str:
        """The sha of a branch, tag, full reference or sha; refuses with 404."""
        refs = self.state().refs
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in refs:
                return refs[name]
        if is_sha(revision) and (self.folder / "commits" / revision).is_file():
            return revision
        raise no_such_revision(revision)

    def commit_at(self, revision: str) -> Commit:
        """The commit that a revision stands for."""
        sha = self.resolve(revision)
        commit = self._commits.get(sha)
        if commit is None:
            raw = json.loads((self.folder / "commits" / sha).read_bytes())
            raw["files"] = {path: FileEntry(*entry) for path, entry in raw["files"].items()}
            commit = Commit(sha=sha, **raw)
            with self._guard:
                while len(self._commits) >= 64:
                    self._commits.pop(next(iter(self._commits)))
                self._commits[sha] = commit
        return commit

    def history(self, revision: str) -> Iterator[Commit]:
        """Commits, newest first."""
        commit = self.commit_at(revision)
        while True:
            yield commit
            if commit.parent is None:
                return
            commit = self.commit_at(commit.parent)

    def entry(self, commit: Commit, path: str) -> FileEntry:
        """A file of a commit; refuses with 404."""
        try:
            return commit.files[path]
        except KeyError:
            raise no_such_entry(path, commit.sha) from None

    def content(self, entry: FileEntry) -> Path:
        """The file that holds the content of an entry."""
        return self.objects.path(entry.content_id)

    def _write_commit(self, parent: str | None, title: str, message: str, author: str, files: dict[str, Any]) -> str:
        raw = {"parent": parent, "title": title, "message": message, "author": author, "date": now()}
        listing = {path: (entry.oid, entry.size, entry.sha256) for path, entry in sorted(files.items())}
        content = json.dumps({**raw, "files": listing}).encode()
        sha = hashlib.sha1(content).hexdigest()
        self.store.write(self.folder / "commits" / sha, content)
        return sha

    def commit(
        self,
        revision: str,
        *,
        title: str,
        message: str = "",
        author: str = "seed",
        add: Mapping[str, FileEntry] | None = None,
        delete: Iterable[str] = (),
        parent: str | None = None,
        create_pr: bool = False,
    ) -> tuple[str, str]:
        """Write one commit on top of a branch or pull request; returns its sha and the reference that now holds it.

        `delete` names files, or folders with a trailing slash, and comes before `add`. A `parent` (7 digits or more)
        that is not the head is refused with 412. `create_pr` leaves the branch alone and opens `refs/pr/N`.
        """
        with self.lock():
            state = self.state()
            reference = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            head = state.refs.get(reference)
            if head is None and state.refs:
                self.resolve(revision)
                raise bad_request(f"Cannot commit to {revision!r}: it is neither a branch nor a pull request")
            if parent and (len(parent) < 7 or not (head or "").startswith(parent)):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(self.commit_at(head).files) if head else {}
            _delete(files, delete, head or "")
            files.update(add or {})
            _check_tree(files, add or {})
            sha = self._write_commit(head, title, message, author, files)
            if create_pr:
                numbers = [int(name.removeprefix("refs/pr/")) for name in state.refs if name.startswith("refs/pr/")]
                reference = f"refs/pr/{max(numbers, default=0) + 1}"
            self._write_state(replace(state, refs={**state.refs, reference: sha}))
        return sha, reference

    def squash(self, branch: str, message: str, author: str) -> str:
        """Replace the history of a branch by one commit."""
        with self.lock():
            state = self.state()
            if f"refs/heads/{branch}" not in state.refs:
                raise no_such_revision(branch)
            sha = self._write_commit(None, message, "", author, dict(self.commit_at(branch).files))
            self._write_state(replace(state, refs={**state.refs, f"refs/heads/{branch}": sha}))
        return sha

    def create_reference(self, prefix: str, name: str, revision: str) -> None:
        """Create `refs/heads/` or `refs/tags/` + `name`; refuses with 409 if it exists."""
        reference = prefix + check_ref(name)
        with self.lock():
            state = self.state()
            if reference in state.refs:
                raise Refusal(409, f"Reference already exists: {name}")
            self._write_state(replace(state, refs={**state.refs, reference: self.resolve(revision)}))

    def delete_reference(self, prefix: str, name: str) -> None:
        """Delete a branch (never main) or tag."""
        with self.lock():
            state = self.state()
            if prefix + name not in state.refs:
                raise no_such_revision(name)
            if prefix + name == "refs/heads/main":
                raise bad_request("Cannot delete the branch main")
            refs = {key: sha for key, sha in state.refs.items() if key != prefix + name}
            self._write_state(replace(state, refs=refs))


def _delete(files: dict[str, FileEntry], paths: Iterable[str], sha: str) -> None:
    for path in paths:
        doomed = [name for name in files if name.startswith(path)] if path.endswith("/") else [path]
        if not doomed or doomed[0] not in files:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound", {"X-Repo-Commit": sha})
        for name in doomed:
            del files[name]


def _check_tree(files: Mapping[str, FileEntry], added: Iterable[str]) -> None:
    for path in added:
        check_path(path)
    folders = {path[:at] for path in files for at, char in enumerate(path) if char == "/"}
    if clash := folders & files.keys():
        raise bad_request(f"{min(clash)!r} cannot be a file and a folder")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
