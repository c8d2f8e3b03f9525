"""Answers other than success, with the headers from which huggingface_hub picks its exception."""

import json

from starlette.responses import Response


class Refusal(Exception):
    """A request that is refused: `status`, a message, the `X-Error-Code` of the Hub and further headers."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None, **body: object
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}
        self.body = {"error": message, **body}

    def response(self) -> Response:
        """The HTTP answer. Names in messages come from clients: what no header may hold is escaped."""
        message = json.dumps(str(self), ensure_ascii=True)[1:-1]
        headers = {"X-Error-Message": message, **self.headers}
        if self.code:
            headers["X-Error-Code"] = self.code
        return Response(json.dumps(self.body, default=str), self.status, headers, media_type="application/json")


def no_such_repository(repo_id: str, *, status: int = 404) -> Refusal:
    """Absent, or private to others: the two look the same."""
    return Refusal(status, f"Repository not found: {repo_id!r}", "RepoNotFound")


def no_such_revision(revision: str) -> Refusal:
    """Neither a branch, a tag, a pull request nor a commit."""
    return Refusal(404, f"Invalid rev id: {revision!r}", "RevisionNotFound")


def no_such_entry(path: str, sha: str) -> Refusal:
    """No such file or folder; the sha lets clients remember the absence."""
    return Refusal(404, f"Entry not found: {path!r}", "EntryNotFound", {"X-Repo-Commit": sha})


def bad_request(message: str) -> Refusal:
    """The request itself makes no sense."""
    return Refusal(400, message)
