"""Who asks, and what they may read and write."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from starlette.requests import Request

from hf_merge.demo.hub.refusal import Refusal, no_such_repository
from hf_merge.demo.hub.store import Repository


@dataclass(frozen=True, kw_only=True)
class Accounts:
    """Token to user name, organization to its members, and the tokens that may only read. Kept in memory alone."""

    users: Mapping[str, str] = field(default_factory=lambda: {"hf_local": "demo", "hf_guest": "guest"}, repr=False)
    organizations: Mapping[str, Collection[str]] = field(default_factory=lambda: {"demo-org": ("demo",)})
    read_only: Collection[str] = field(default=(), repr=False)


@dataclass(frozen=True)
class User:
    """The account behind a token."""

    name: str
    organizations: tuple[str, ...]
    can_write: bool

    def belongs_to(self, namespace: str) -> bool:
        """Whether the namespace is the user's own or one of an organization of theirs."""
        return namespace in (self.name, *self.organizations)


class Gate:
    """Answers what a request may do."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    def viewer(self, request: Request) -> User | None:
        """The user, None without a token; a token that nobody has is refused with 401."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not token:
            return None
        name = self._accounts.users.get(token) if scheme.lower() == "bearer" else None
        if name is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        member_of = tuple(org for org, members in self._accounts.organizations.items() if name in members)
        return User(name, member_of, token not in self._accounts.read_only)

    def user(self, request: Request) -> User:
        """The user; refused with 401 without a token."""
        viewer = self.viewer(request)
        if viewer is None:
            raise Refusal(401, "Invalid username or password.")
        return viewer

    def writer(self, request: Request, namespace: str) -> User:
        """The user, who may write in the namespace; refused with 403."""
        viewer = self.viewer(request)
        if viewer is None:
            raise Refusal(403, "Forbidden: writing needs a token")
        if not viewer.can_write:
            raise Refusal(403, "Forbidden: this token may only read")
        if not viewer.belongs_to(namespace):
            raise Refusal(403, f"Forbidden: {viewer.name!r} may not write in the namespace {namespace!r}")
        return viewer

    def can_read(self, viewer: User | None, repository: Repository) -> bool:
        """Whether the repository exists for this user."""
        return not repository.state().private or (viewer is not None and viewer.belongs_to(repository.namespace))

    def check_read(self, request: Request, repository: Repository) -> User | None:
        """Refuse a private repository of others as if it did not exist."""
        viewer = self.viewer(request)
        if not self.can_read(viewer, repository):
            raise no_such_repository(repository.repo_id, status=401 if viewer is None else 404)
        return viewer

    def check_write(self, request: Request, repository: Repository) -> User:
        """Refuse with 403 who may read but not write."""
        self.check_read(request, repository)
        return self.writer(request, repository.namespace)

    def check_contents(self, request: Request, repository: Repository) -> None:
        """Refuse the files of a gated repository."""
        viewer = self.check_read(request, repository)
        if repository.state().gated and (viewer is None or not viewer.belongs_to(repository.namespace)):
            status = 401 if viewer is None else 403
            raise Refusal(status, f"Access to model {repository.repo_id} is restricted.", "GatedRepo")
