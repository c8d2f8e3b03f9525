"""Routes that create and change repositories, their settings and references."""

import json
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hf_merge.demo.hub.access import Gate
from hf_merge.demo.hub.cards import check_card
from hf_merge.demo.hub.names import check_new_repo_id, kind_of
from hf_merge.demo.hub.reading import argument, repo_id_of
from hf_merge.demo.hub.refusal import Refusal, bad_request
from hf_merge.demo.hub.store import Repository, State, Store, now

GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"


async def json_body(request: Request) -> dict[str, Any]:
    """The body as a JSON object; refused with 400 if it is not one."""
    try:
        data = json.loads(await request.body() or b"{}")
    except ValueError:
        raise bad_request("The body is not valid JSON") from None
    if not isinstance(data, dict):
        raise bad_request("The body must be a JSON object")
    return data


def post(path: str, handler: Any) -> Route:
    """A route for POST."""
    return Route(path, handler, methods=["POST"])


class Writer:
    """What handlers that change repositories share."""

    def __init__(self, store: Store, gate: Gate) -> None:
        self.store = store
        self.gate = gate

    def url(self, request: Request, path: str) -> str:
        """The address as this client sees it."""
        return f"http://{request.headers['host']}/{path}"

    def repository(self, request: Request) -> Repository:
        """The repository of the path, if this request may read it."""
        repository = self.store.get(argument(request, "kind", "models"), repo_id_of(request))
        self.gate.check_read(request, repository)
        return repository

    def writable(self, request: Request) -> Repository:
        """The repository of the path, if this request may write it."""
        repository = self.repository(request)
        self.gate.check_write(request, repository)
        return repository


class Writing(Writer):
    """The handlers of repositories, their settings and references."""

    def routes(self) -> list[Route]:
        """The routes."""
        repo = "/api/{kind:kind}/{namespace}/{name}"

        return [
            post("/api/repos/create", self.create),
            Route("/api/repos/delete", self.delete, methods=["DELETE"]),
            post("/api/repos/move", self.move),
            post("/api/validate-yaml", self.validate_yaml),
            Route(repo + "/settings", self.settings, methods=["PUT"]),
            post(repo + "/branch/{branch}", self.create_branch),
            Route(repo + "/branch/{branch}", self.delete_branch, methods=["DELETE"]),
            post(repo + "/tag/{tag}", self.create_tag),
            Route(repo + "/tag/{tag}", self.delete_tag, methods=["DELETE"]),
            post(repo + "/super-squash/{branch}", self.squash),
            post(repo + "/duplicate", self.duplicate),
        ]

    # Repositories

    def _named_by(self, request: Request, data: dict[str, Any]) -> tuple[str, str]:
        namespace = data.get("organization") or self.gate.user(request).name
        return kind_of(data.get("type")), f"{namespace}/{data.get('name')}"

    async def create(self, request: Request) -> Response:
        """A repository with a first commit; 409 with the address if it exists."""
        data = await json_body(request)
        kind, repo_id = self._named_by(request, data)
        check_new_repo_id(repo_id)
        user = self.gate.writer(request, repo_id.split("/")[0])
        space: dict[str, Any] = {key: data[key] for key in ("sdk", "hardware", "variables", "volumes") if key in data}
        if kind == "spaces" and "sdk" not in data:
            raise bad_request("A Space needs an sdk")
        private = data.get("visibility") == "private" or data.get("private") is True
        url = self.url(request, repo_id if kind == "models" else f"{kind}/{repo_id}")

        def create() -> None:
            repository = self.store.create(kind, repo_id, State(created=now(), private=private, space=space))
            attributes = repository.objects.add_bytes(GIT_ATTRIBUTES)
            repository.commit("main", title="initial commit", author=user.name, add={".gitattributes": attributes})

        try:
            await run_in_threadpool(create)
        except Refusal as refusal:
            refusal.body["url"] = url
            raise
        return JSONResponse({"url": url, "name": repo_id, "id": repo_id})

    async def delete(self, request: Request) -> Response:
        """Delete a repository."""
        kind, repo_id = self._named_by(request, await json_body(request))
        self.gate.check_write(request, self.store.get(kind, repo_id))
        await run_in_threadpool(self.store.delete, kind, repo_id)
        return JSONResponse({})

    async def move(self, request: Request) -> Response:
        """Rename a repository."""
        data = await json_body(request)
        kind, old, new = kind_of(data.get("type")), str(data.get("fromRepo")), str(data.get("toRepo"))
        self.gate.check_write(request, self.store.get(kind, old))
        self.gate.writer(request, check_new_repo_id(new).split("/")[0])
        await run_in_threadpool(self.store.move, kind, old, new)
        return JSONResponse({})

    async def settings(self, request: Request) -> Response:
        """Change privacy or gating."""
        repository = self.writable(request)
        data = await json_body(request)
        changes: dict[str, bool] = {}
        if "visibility" in data or "private" in data:
            changes["private"] = data.get("visibility") == "private" or data.get("private") is True
        if "gated" in data:
            changes["gated"] = bool(data["gated"])
        await run_in_threadpool(lambda: repository.update(**changes))
        return JSONResponse({})

    async def duplicate(self, request: Request) -> Response:
        """Copy a repository on the server."""
        repository = self.repository(request)
        data = await json_body(request)
        target = check_new_repo_id(str(data.get("repository")))
        self.gate.writer(request, target.split("/")[0])
        url = self.url(request, target if repository.kind == "models" else f"{repository.kind}/{target}")
        private = data.get("visibility") == "private"
        copy = self.store.duplicate
        try:
            await run_in_threadpool(copy, repository.kind, repository.repo_id, target, private=private)
        except Refusal as refusal:
            refusal.body["url"] = url
            raise
        return JSONResponse({"url": url})

    async def validate_yaml(self, request: Request) -> Response:
        """Check a card; 400 if it has errors."""
        errors, warnings = check_card(str((await json_body(request)).get("content", "")))
        answer = {key: [{"message": text} for text in texts] for key, texts in (("errors", errors), ("warnings", warnings))}
        return JSONResponse(answer, 400 if errors else 200)

    # References

    async def create_branch(self, request: Request) -> Response:
        """A branch at a revision."""
        repository = self.writable(request)
        start = str((await json_body(request)).get("startingPoint") or "main")
        await run_in_threadpool(repository.create_reference, "refs/heads/", argument(request, "branch"), start)
        return JSONResponse({})

    async def delete_branch(self, request: Request) -> Response:
        """Delete a branch."""
        repository = self.writable(request)
        await run_in_threadpool(repository.delete_reference, "refs/heads/", argument(request, "branch"))
        return JSONResponse({})

    async def create_tag(self, request: Request) -> Response:
        """A tag; the path names the revision, the body the tag."""
        repository = self.writable(request)
        name = str((await json_body(request)).get("tag"))
        await run_in_threadpool(repository.create_reference, "refs/tags/", name, argument(request, "tag"))
        return JSONResponse({})

    async def delete_tag(self, request: Request) -> Response:
        """Delete a tag."""
        repository = self.writable(request)
        await run_in_threadpool(repository.delete_reference, "refs/tags/", argument(request, "tag"))
        return JSONResponse({})

    async def squash(self, request: Request) -> Response:
        """Make the history of a branch one commit."""
        repository = self.writable(request)
        author = self.gate.user(request).name
        message = str((await json_body(request)).get("message") or "Super-squash branch")
        await run_in_threadpool(repository.squash, argument(request, "branch"), message, author)
        return JSONResponse({})
