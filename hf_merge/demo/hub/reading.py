"""Routes that read: account, metadata, trees, files."""

from typing import Any
from urllib.parse import parse_qs, unquote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hf_merge.demo.hub import info
from hf_merge.demo.hub.access import Gate
from hf_merge.demo.hub.refusal import bad_request, no_such_repository
from hf_merge.demo.hub.serve_file import FileContent
from hf_merge.demo.hub.store import Repository, Store


def argument(request: Request, name: str, default: str = "") -> str:
    """A part of the path. Routes match the raw path, so that `trial%2F7` is one part; here it is decoded."""
    return unquote(request.path_params.get(name, default))


def repo_id_of(request: Request) -> str:
    """`namespace/name` of the path."""
    return f"{argument(request, 'namespace')}/{argument(request, 'name')}"


def flag(value: object) -> bool:
    """A boolean of a query or form."""
    return str(value).lower() in ("true", "1")


def limit(request: Request) -> int | None:
    """How many results the client wants."""
    value = request.query_params.get("limit")
    if value is not None and not value.isdecimal():
        raise bad_request(f"limit must be a number, not {value!r}")
    return None if value is None else int(value)


class Reading:
    """The handlers of everything that changes nothing."""

    def __init__(self, store: Store, gate: Gate) -> None:
        self.store = store
        self.gate = gate

    def routes(self) -> list[Route]:
        """The routes; kinds of repositories are told apart by the path."""
        repo = "/api/{kind:kind}/{namespace}/{name}"
        file = "/{namespace}/{name}/resolve/{revision}/{path:path}"
        bare = [
            f"/api/{{kind:kind}}/{{name}}{rest}"
            for rest in ("", "/revision/{revision}", "/refs", "/tree/{revision}", "/tree/{revision}/{path:path}")
        ]
        return [
            Route("/api/whoami-v2", self.whoami),
            Route("/api/{kind:kind}", self.list_repositories),
            Route(repo, self.repository_info),
            Route(repo + "/revision/{revision}", self.repository_info),
            Route(repo + "/tree/{revision}", self.tree),
            Route(repo + "/tree/{revision}/{path:path}", self.tree),
            Route(repo + "/paths-info/{revision}", self.paths_info, methods=["POST"]),
            Route(repo + "/refs", self.references),
            Route(repo + "/commits/{revision}", self.commits),
            Route(repo + "/auth-check", self.auth_check),
            Route(repo + "/auth-check/write", self.auth_check_write),
            Route(repo + "/safetensors-metadata/{path:path}", self.safetensors_metadata),
            Route("/{kind:kind}" + file, self.resolve),
            Route(file, self.resolve),
            *(Route(path, self.unnamespaced) for path in bare),
            Route("/{name}/resolve/{revision}/{path:path}", self.unnamespaced),
        ]

    def repository(self, request: Request) -> Repository:
        """The repository of the path, if this request may read it."""
        repository = self.store.get(argument(request, "kind", "models"), repo_id_of(request))
        self.gate.check_read(request, repository)
        return repository

    async def unnamespaced(self, request: Request) -> Response:
        """A name without a namespace: there are none of these here."""
        self.gate.viewer(request)
        raise no_such_repository(argument(request, "name"))

    async def whoami(self, request: Request) -> Response:
        """Who the token belongs to."""
        user = self.gate.user(request)
        role = "write" if user.can_write else "read"
        organizations = [{"type": "org", "name": name, "roleInOrg": role} for name in user.organizations]
        token = {"displayName": "local", "role": role}
        return JSONResponse(
            {
                "type": "user",
                "id": user.name,
                "name": user.name,
                "fullname": user.name,
                "orgs": organizations,
                "auth": {"type": "access_token", "accessToken": token},
            }
        )

    async def list_repositories(self, request: Request) -> Response:
        """Repositories that the viewer may see and that fit filter, search and author; newest first with `sort`."""
        viewer = self.gate.viewer(request)
        query = request.query_params

        def collect() -> list[dict[str, Any]]:
            found = []
            for repository in self.store.all(argument(request, "kind")):
                if not self.gate.can_read(viewer, repository):
                    continue
                item = info.repository_json(repository, "main")
                pipeline = query.get("pipeline_tag")
                if pipeline in (None, item.get("pipeline_tag")) and info.matches(
                    item, filters=query.getlist("filter"), search=query.getlist("search"), author=query.get("author")
                ):
                    found.append(item)
            return found

        found = await run_in_threadpool(collect)
        if (key := query.get("sort")) in ("lastModified", "createdAt"):
            found.sort(key=lambda item: str(item[key]), reverse=True)
        found = found[: limit(request)]
        return JSONResponse([info.only(item, query.getlist("expand")) for item in found])

    async def repository_info(self, request: Request) -> Response:
        """All properties, or those of `expand`."""
        repository = self.repository(request)
        query = request.query_params
        revision = argument(request, "revision", "main")
        item = await run_in_threadpool(info.repository_json, repository, revision, blobs=flag(query.get("blobs")))
        return JSONResponse(info.only(item, query.getlist("expand")))

    async def tree(self, request: Request) -> Response:
        """The files and folders below a folder."""
        repository = self.repository(request)
        commit = repository.commit_at(argument(request, "revision"))
        query = request.query_params
        entries = info.tree_json(commit, argument(request, "path"), recursive=flag(query.get("recursive")))
        if flag(query.get("expand")):
            await run_in_threadpool(info.add_last_commits, repository, commit, entries)
        return JSONResponse(entries)

    async def paths_info(self, request: Request) -> Response:
        """The entries of the paths that exist."""
        repository = self.repository(request)
        commit = repository.commit_at(argument(request, "revision"))
        form = parse_qs((await request.body()).decode("utf-8", "replace"))
        paths = form.get("paths", [])
        folders = info.folders_of(commit.files)
        entries = []
        for path in (item.strip("/") for item in paths):
            if path in commit.files:
                entries.append(info.file_json(path, commit.files[path], xet_hash=True))
            elif path in folders:
                entries.append(info.folder_json(path, commit))
        if flag(form.get("expand", ["false"])[0]):
            await run_in_threadpool(info.add_last_commits, repository, commit, entries)
        return JSONResponse(entries)

    async def references(self, request: Request) -> Response:
        """Branches, tags and, when asked, pull requests."""
        refs = self.repository(request).state().refs

        def under(prefix: str, shown: str) -> list[dict[str, str]]:
            return [
                {"name": shown + name.removeprefix(prefix), "ref": name, "targetCommit": sha}
                for name, sha in refs.items()
                if name.startswith(prefix)
            ]

        answer = {"branches": under("refs/heads/", ""), "tags": under("refs/tags/", ""), "converts": []}
        if flag(request.query_params.get("include_prs")):
            answer["pullRequests"] = under("refs/pr/", "refs/pr/")
        return JSONResponse(answer)

    async def commits(self, request: Request) -> Response:
        """The history, newest first."""
        repository = self.repository(request)
        return JSONResponse(
            [
                {
                    "id": commit.sha,
                    "title": commit.title,
                    "message": commit.message,
                    "date": commit.date,
                    "authors": [{"user": commit.author}],
                }
                for commit in repository.history(argument(request, "revision"))
            ]
        )

    async def auth_check(self, request: Request) -> Response:
        """Whether the files may be read."""
        self.gate.check_contents(request, self.repository(request))
        return JSONResponse({})

    async def auth_check_write(self, request: Request) -> Response:
        """Whether the repository may be written."""
        self.gate.check_write(request, self.repository(request))
        return JSONResponse({})

    async def safetensors_metadata(self, request: Request) -> Response:
        """All headers of a sharded model."""
        repository = self.repository(request)
        self.gate.check_contents(request, repository)
        commit = repository.commit_at("main")
        return JSONResponse(await run_in_threadpool(info.safetensors_json, repository, commit, argument(request, "path")))

    async def resolve(self, request: Request) -> Response:
        """A file or its headers."""
        repository = self.store.get(argument(request, "kind", "models"), repo_id_of(request))
        self.gate.check_contents(request, repository)
        commit = repository.commit_at(argument(request, "revision"))
        entry = repository.entry(commit, argument(request, "path"))
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{entry.content_id}"'}
        if entry.sha256:
            headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        wanted = request.headers.get("range") if request.method == "GET" else None
        return FileContent(repository.content(entry), entry.size, headers, wanted)
