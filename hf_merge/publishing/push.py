"""Writing to the Hub: may we, before the work; every shard as soon as it is whole; all of it in one commit.

The `HfApi` is given, so a local Hub stands in for the real one. No message repeats a token.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from threading import Lock
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_merge.errors import PublishError
from hf_merge.patience import patiently
from hf_merge.publishing.hub_errors import said
from hf_merge.publishing.markdown import one_line
from hf_merge.publishing.resume import PushState, UploadedShard

LOGIN = "Log in with `hf auth login`, or pass a token that may write: https://huggingface.co/settings/tokens"
OURS = ("model*.safetensors", "model.safetensors.index.json", "recipe.yaml", "front.json", "front.png")
"""Files of an earlier merge. Left beside a new one they would contradict it: loaders prefer a stray model.safetensors."""
LARGEST_REGULAR = 10_000_000
"""Bytes above which the Hub takes every file as LFS, unless the repository's .gitignore drops it."""
NOTE, DESCRIPTION = 500, 150
"""The most characters that the Hub takes for a collection's notes and its description."""


def check_writable(repo_id: str, api: HfApi, *, private: bool | None = None, create_pr: bool = False) -> str:
    """Whether `api`'s user may write this model repository, or create it: asked before hours of work, and nothing is created.

    Returns the whole id, with the user's namespace if it was given without one. With `create_pr` an existing repository that
    may be read is enough. Raises `PublishError` for a bad id, no or a bad token, a missing permission, or an existing public
    repository where a `private` one is wanted.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} is not the id of a repository: expected 'namespace/name'. {error}") from error
    user = _whoami(api)
    namespace, _, name = repo_id.rpartition("/")
    whole = repo_id if namespace else f"{user['name']}/{name}"
    with said(f"The Hub did not say whether {whole} may be written", api):
        try:
            patiently(lambda: api.auth_check(whole, write=not create_pr))
            _check_private(whole, api, private)
            return whole
        except GatedRepoError as error:
            raise PublishError(
                f"{whole} is gated, and this account has no access: ask for it at {api.endpoint}/{whole}."
            ) from error
        except RepositoryNotFoundError as error:
            if create_pr:
                raise PublishError(
                    f"{whole} does not exist or is private: a pull request needs a repository to open it in."
                ) from error
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            raise PublishError(
                f"{user['name']!r} may not write to {whole}, which exists: choose another id. {LOGIN}"
            ) from error
    _check_may_create(whole, user)
    return whole


def _whoami(api: HfApi) -> dict[str, Any]:
    with said("The Hub did not say whose token this is", api):
        try:
            if api.token is False:
                raise LocalTokenNotFoundError
            user: dict[str, Any] = patiently(api.whoami)
        except LocalTokenNotFoundError as error:
            raise PublishError(f"Writing to the Hub needs a token, and there is none. {LOGIN}") from error
        except HfHubHTTPError as error:
            if error.response.status_code != 401:
                raise
            raise PublishError(f"The Hub does not know this token: it is mistyped, expired or revoked. {LOGIN}") from error
    token = user.get("auth", {}).get("accessToken", {})
    scopes = token.get("fineGrained", {}).get("scoped") or []
    allowed = {permission for scope in scopes for permission in scope.get("permissions", ())}
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and scopes and "repo.write" not in allowed):
        raise PublishError(f"This token of {user['name']!r} may only read. {LOGIN}")
    return user


def _check_may_create(repo_id: str, user: Mapping[str, Any]) -> None:
    namespace = repo_id.partition("/")[0]
    roles = {org["name"]: org.get("roleInOrg") for org in user.get("orgs", ())}
    if namespace != user["name"] and namespace not in roles:
        mine = ", ".join([user["name"], *roles])
        raise PublishError(f"{repo_id} cannot be created: {user['name']!r} may write in these namespaces: {mine}.")
    if roles.get(namespace) == "read":
        raise PublishError(f"{repo_id} cannot be created: {user['name']!r} may only read in {namespace!r}.")


def _check_private(repo_id: str, api: HfApi, private: bool | None) -> None:
    # The Hub ignores `private` for a repository that exists.
    if private and not patiently(lambda: api.model_info(repo_id)).private:
        raise PublishError(f"{repo_id} exists and is public: make it private in its settings first, or choose another id.")


class ShardUpload:
    """A model on its way into a repository: shards are uploaded and dropped one by one, and one commit makes them visible.

    The repository (and the branch `revision`) is created with the first shard or the commit, whichever comes first. Until the
    commit it shows nothing of the merge. With a `state` every upload is noted there, and a push that was cut off, even
    killed, finds with `has` what the Hub holds of it. What the Hub puts off is asked for again.
    """

    def __init__(
        self,
        api: HfApi,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        state: PushState | None = None,
    ) -> None:
        self.api, self.repo_id, self.private = api, repo_id, private
        self.revision, self.create_pr, self.state = revision, create_pr, state
        self._shards: dict[str, CommitOperationAdd] = {}
        self._lock, self._ready = Lock(), False

    def has(self, name: str, size: int) -> bool:
        """Whether an earlier run uploaded this shard and the Hub still holds it; then the commit will name it."""
        if name in self._shards:
            return True
        shard = self.state.noted(name) if self.state is not None else None
        if shard is None or shard.size != size:
            return False
        self._prepare()
        with said(f"The Hub did not say whether it holds {name}", self.api):
            if not shard.is_held(self.api, self.repo_id, None if self.create_pr else self.revision or "main"):
                return False
        self._shards[name] = shard.operation()
        return True

    def add_shard(self, path: Path) -> None:
        """Upload a finished file under its own name, and delete it here. Several threads may do so at once."""
        self._prepare()
        with said(f"{path.name} could not be uploaded to {self.repo_id}", self.api):
            operation = CommitOperationAdd(path.name, path)
            upload = partial(self.api.preupload_lfs_files, revision=self.revision, create_pr=self.create_pr)
            patiently(lambda: upload(self.repo_id, [operation]), reached=True)
            if operation.path_or_fileobj != b"":
                # Not LFS: nothing was sent, and the commit itself will carry the bytes.
                if path.stat().st_size > LARGEST_REGULAR:
                    raise PublishError(f"{path.name} was not taken: does the .gitignore of {self.repo_id} leave it out?")
                operation = CommitOperationAdd(path.name, path.read_bytes())
            elif self.state is not None:
                self.state.note(UploadedShard.of(operation))
        path.unlink()
        self._shards[path.name] = operation

    def finished(self) -> list[UploadedShard]:
        """All shards so far, for the process that makes the commit."""
        return [UploadedShard.of(operation) for operation in self._shards.values()]

    def commit(
        self,
        files: Mapping[str, bytes | Path],
        message: str,
        description: str | None = None,
        *,
        also: Sequence[UploadedShard] = (),
    ) -> CommitInfo:
        """All shards and `files` (path in the repository to content) in one commit, which removes an earlier merge's files.

        `also` are shards that other processes have `finished`. Returns what the Hub made of it, a text that is the commit's
        address and knows `oid`, `commit_url` and `pr_url`.
        """
        self._prepare()
        others = [shard.operation() for shard in also if shard.name not in self._shards]
        given = [CommitOperationAdd(name, content) for name, content in files.items()]
        added = [*self._shards.values(), *others, *given]
        with said(f"The commit to {self.repo_id} failed", self.api):
            removed = self._left_over({operation.path_in_repo for operation in added})
            return self._send([*added, *removed], message, description)

    def _send(
        self, operations: list[CommitOperationAdd | CommitOperationDelete], message: str, description: str | None
    ) -> CommitInfo:
        """One commit, once: a Hub that answers with an error may have made it all the same."""
        before, tries = "", 0
        if not self.create_pr:
            info = patiently(lambda: self.api.model_info(self.repo_id, revision=self.revision), reached=True)
            before = str(info.sha)

        def send() -> CommitInfo:
            nonlocal tries
            tries += 1
            if tries > 1 and (made := self._made_since(before, message)):
                return made
            return self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                commit_description=description,
                revision=self.revision,
                create_pr=self.create_pr,
            )

        # Nobody can tell whether a pull request was opened by us: it is asked for once.
        return send() if self.create_pr else patiently(send, reached=True)

    def _made_since(self, before: str, message: str) -> CommitInfo | None:
        commits = self.api.list_repo_commits(self.repo_id, revision=self.revision)
        for commit in takewhile(lambda commit: commit.commit_id != before, commits):
            if commit.title == message.partition("\n")[0]:
                address = f"{self.api.endpoint}/{self.repo_id}/commit/{commit.commit_id}"
                return CommitInfo(address, message, commit.message, commit.commit_id, self.api.endpoint)
        return None

    def _prepare(self) -> None:
        with self._lock:
            if self._ready or self.create_pr:
                return
            with said(f"{self.repo_id} could not be created", self.api):
                self.repo_id = patiently(self._create, reached=True)
                _check_private(self.repo_id, self.api, self.private)
            self._ready = True

    def _create(self) -> str:
        repo_id = self.api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
        if self.revision is not None:
            self.api.create_branch(repo_id, branch=self.revision, exist_ok=True)
        return str(repo_id)

    def _left_over(self, new: set[str]) -> list[CommitOperationDelete]:
        there = (Path(name) for name in self.api.list_repo_files(self.repo_id, revision=self.revision))
        ours = [path for path in there if len(path.parts) == 1 and any(path.match(pattern) for pattern in OURS)]
        return [CommitOperationDelete(path.name) for path in ours if path.name not in new]


def push_collection(
    title: str,
    entries: Sequence[tuple[str, str]],
    api: HfApi,
    *,
    namespace: str | None = None,
    description: str = "",
    private: bool = False,
) -> str:
    """A collection of published points `(repo_id, note)` in the order given, or more for one that exists. Returns its slug."""
    with said(f"The collection {title!r} could not be written", api):
        about = one_line(description)[:DESCRIPTION] or None
        create = partial(api.create_collection, namespace=namespace, description=about, private=private, exists_ok=True)
        collection = patiently(lambda: create(title), reached=True)
        for repo_id, note in entries:
            short = one_line(note)[:NOTE] or None
            add = partial(api.add_collection_item, collection.slug, repo_id, "model", note=short, exists_ok=True)
            patiently(add, reached=True)
    return str(collection.slug)
