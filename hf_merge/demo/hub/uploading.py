"""Routes that take files: what to send how, LFS objects, commits."""

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hf_merge.demo.hub.access import Gate
from hf_merge.demo.hub.cards import check_card
from hf_merge.demo.hub.names import check_path, is_sha256, kind_of
from hf_merge.demo.hub.objects import CHUNK, REGULAR_LIMIT, FileEntry, goes_to_lfs, lfs_entry
from hf_merge.demo.hub.reading import argument, flag, repo_id_of
from hf_merge.demo.hub.refusal import Refusal, bad_request
from hf_merge.demo.hub.store import Repository, Store
from hf_merge.demo.hub.writing import Writer, json_body, post

_LFS_JSON = "application/vnd.git-lfs+json"


class Uploading(Writer):
    """The handlers of uploads. `secret` signs their addresses."""

    def __init__(self, store: Store, gate: Gate, secret: bytes) -> None:
        super().__init__(store, gate)
        self.secret = secret

    def routes(self) -> list[Route]:
        """The routes."""
        repo = "/api/{kind:kind}/{namespace}/{name}"
        batch = "/{namespace}/{name}.git/info/lfs/objects/batch"
        upload = "/_lfs/{kind:kind}/{namespace}/{name}/{sha256}"
        return [
            post(repo + "/preupload/{revision}", self.preupload),
            post(repo + "/commit/{revision}", self.commit),
            post(repo + "/lfs-files/duplicate", self.duplicate_lfs_files),
            post("/{kind:kind}" + batch, self.lfs_batch),
            post(batch, self.lfs_batch),
            Route(upload, self.lfs_upload, methods=["PUT"]),
            post(upload + "/verify", self.lfs_verify),
        ]

    def _contributable(self, request: Request, *, pull_request: bool) -> tuple[Repository, str]:
        """The repository and the author: who may write, or any user for a pull request."""
        repository = self.repository(request)
        if pull_request:
            return repository, self.gate.user(request).name
        return repository, self.gate.check_write(request, repository).name

    async def preupload(self, request: Request) -> Response:
        """How each file has to be sent, and the id of the content already there."""
        pull_request = flag(request.query_params.get("create_pr"))
        repository, _ = self._contributable(request, pull_request=pull_request)
        revision = argument(request, "revision")
        present = repository.commit_at(revision).files if repository.state().refs else {}
        answer = []
        for file in (await json_body(request)).get("files", []):
            try:
                path, size, sample = check_path(file["path"]), int(file["size"]), base64.b64decode(file.get("sample", ""))
            except (KeyError, TypeError, ValueError):
                raise bad_request(f"Expected path, size and base64 sample of a file, got {file!r}") from None
            lfs = goes_to_lfs(path, size, sample)
            item: dict[str, Any] = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in present:
                item["oid"] = present[path].content_id
            answer.append(item)
        return JSONResponse({"files": answer})

    def _signature(self, repository: Repository, sha256: str) -> str:
        return hmac.new(self.secret, f"{repository.url_path} {sha256}".encode(), hashlib.sha256).hexdigest()

    async def lfs_batch(self, request: Request) -> Response:
        """Where to send each object; objects that are there already have no actions."""
        data = await json_body(request)
        repository, _ = self._contributable(request, pull_request="ref" not in data)
        if data.get("operation") != "upload" or data.get("hash_algo", "sha256") != "sha256":
            raise bad_request("Only uploads with sha256 are supported")
        answer = []
        for item in data.get("objects", []):
            sha256, size = item.get("oid"), item.get("size")
            result: dict[str, Any] = {"oid": sha256, "size": size}
            if not is_sha256(sha256) or not isinstance(size, int) or size < 0:
                result["error"] = {"code": 422, "message": "Invalid oid or size"}
            elif not repository.objects.has(sha256):
                path = f"_lfs/{repository.kind}/{repository.repo_id}/{sha256}"
                query = f"?signature={self._signature(repository, sha256)}"
                upload, verify = self.url(request, path + query), self.url(request, f"{path}/verify{query}")
                result["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            answer.append(result)
        return JSONResponse({"transfer": "basic", "objects": answer}, media_type=_LFS_JSON)

    def _signed(self, request: Request) -> tuple[Repository, str]:
        repository = self.store.get(argument(request, "kind"), repo_id_of(request))
        sha256 = argument(request, "sha256")
        given = request.query_params.get("signature", "")
        if not is_sha256(sha256) or not hmac.compare_digest(given.encode(), self._signature(repository, sha256).encode()):
            raise Refusal(403, "The signature of this upload address is wrong")
        return repository, sha256

    async def lfs_upload(self, request: Request) -> Response:
        """Take the bytes of an object; refused with 400 if they do not have the promised hash."""
        repository, sha256 = self._signed(request)
        temporary = self.store.temporary()
        try:
            received = await _receive(request, temporary)
            if received != sha256:
                raise bad_request(f"The content has sha256 {received}, not the announced {sha256}")
            await run_in_threadpool(repository.objects.adopt, temporary, sha256)
        finally:
            temporary.unlink(missing_ok=True)
        return Response(status_code=200)

    async def lfs_verify(self, request: Request) -> Response:
        """Whether an object is there with this size."""
        repository, sha256 = self._signed(request)
        data = await json_body(request)
        if not repository.objects.has(sha256):
            raise Refusal(404, f"No object {sha256} was uploaded")
        if repository.objects.path(sha256).stat().st_size != data.get("size"):
            raise bad_request(f"The object {sha256} does not have size {data.get('size')}")
        return JSONResponse({})

    async def duplicate_lfs_files(self, request: Request) -> Response:
        """Take objects over from another repository without sending them."""
        source = self.repository(request)
        self.gate.check_contents(request, source)
        data = await json_body(request)
        goal = data.get("target") or {}
        target = self.store.get(kind_of(goal.get("type")), str(goal.get("name")))
        self.gate.check_write(request, target)
        failed = []
        for item in data.get("files", []):
            sha256 = item.get("sha256")
            if not is_sha256(sha256) or not source.objects.has(sha256):
                failed.append({"sha256": sha256, "error": f"{source.repo_id} has no such object"})
                continue
            path = source.objects.path(sha256)
            await run_in_threadpool(target.objects.add_file, f"{sha256}.bin", path)
        return JSONResponse({"failed": failed})

    async def commit(self, request: Request) -> Response:
        """One commit from lines of JSON."""
        pull_request = flag(request.query_params.get("create_pr"))
        repository, author = self._contributable(request, pull_request=pull_request)
        body = self.store.temporary()
        try:
            await _receive(request, body)

            def commit() -> tuple[str, str]:
                with body.open("rb") as lines:
                    change = _Change(repository, lines)
                return repository.commit(
                    argument(request, "revision"), author=author, create_pr=pull_request, **change.arguments()
                )

            sha, reference = await run_in_threadpool(commit)
        finally:
            body.unlink(missing_ok=True)
        home = self.url(request, repository.url_path)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{home}/commit/{sha}", "hookOutput": ""}
        if pull_request:
            answer["pullRequestUrl"] = f"{home}/discussions/{reference.removeprefix('refs/pr/')}"
        return JSONResponse(answer)


async def _receive(request: Request, target: Path) -> str:
    """Write the body to a file as it comes; returns its sha256."""
    digest = hashlib.sha256()
    buffer = bytearray()
    with target.open("wb") as file:

        def flush() -> None:
            digest.update(buffer)
            file.write(buffer)

        async for chunk in request.stream():
            buffer += chunk
            if len(buffer) >= CHUNK:
                await run_in_threadpool(flush)
                buffer.clear()
        flush()
    return digest.hexdigest()


class _Change:
    """What the lines of a commit say; contents of plain files are stored at once."""

    def __init__(self, repository: Repository, lines: Iterable[bytes]) -> None:
        self.repository = repository
        self.header: dict[str, Any] = {}
        self.add: dict[str, FileEntry] = {}
        self.delete: list[str] = []
        for line in lines:
            if line.strip():
                self._line(line)
        if not self.header.get("summary"):
            raise bad_request("A commit needs a header with a summary")

    def arguments(self) -> dict[str, Any]:
        """Arguments for `Repository.commit`."""
        return {
            "title": str(self.header["summary"]),
            "message": str(self.header.get("description") or ""),
            "parent": self.header.get("parentCommit"),
            "add": self.add,
            "delete": self.delete,
        }

    def _line(self, line: bytes) -> None:
        try:
            item = json.loads(line)
            key, value = item["key"], item["value"]
        except (ValueError, KeyError, TypeError):
            raise bad_request("Each line of a commit must be a JSON object with key and value") from None
        if key == "header":
            self.header = value
        elif key == "file":
            self.add[check_path(value.get("path"))] = self._plain(value)
        elif key == "lfsFile":
            self.add[check_path(value.get("path"))] = self._lfs(value)
        elif key == "deletedFile":
            self.delete.append(check_path(value.get("path")))
        elif key == "deletedFolder":
            self.delete.append(check_path(str(value.get("path")).rstrip("/")) + "/")
        else:
            raise bad_request(f"Unknown operation {key!r} in a commit")

    def _plain(self, value: dict[str, Any]) -> FileEntry:
        try:
            content = base64.b64decode(value.get("content", ""), validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise bad_request(f"The content of {value['path']!r} is not base64") from None
        if len(content) > REGULAR_LIMIT:
            raise bad_request(f"{value['path']!r} is too large for a plain file; send it through LFS")
        if value["path"] == "README.md":
            errors, _ = check_card(content.decode("utf-8", "replace"))
            if errors:
                raise bad_request("; ".join(errors))
        return self.repository.objects.add_bytes(content)

    def _lfs(self, value: dict[str, Any]) -> FileEntry:
        sha256 = value.get("oid")
        if not is_sha256(sha256) or not self.repository.objects.has(str(sha256)):
            raise bad_request(f"The LFS object of {value['path']!r} was never uploaded: {sha256!r}")
        size = self.repository.objects.path(str(sha256)).stat().st_size
        if value.get("size") not in (None, size):
            raise bad_request(f"{value['path']!r} has {size} bytes, not {value['size']!r}")
        return lfs_entry(str(sha256), size)
