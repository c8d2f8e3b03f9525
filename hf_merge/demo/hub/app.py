"""The ASGI application: all routes, the admin routes below `/_local/`, and what happens when something goes wrong."""

import secrets
import traceback
from dataclasses import asdict

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hf_merge.demo.hub.access import Accounts, Gate
from hf_merge.demo.hub.faults import Controls, Misbehavior, as_fault
from hf_merge.demo.hub.gathering import Gathering
from hf_merge.demo.hub.names import KINDS
from hf_merge.demo.hub.reading import Reading
from hf_merge.demo.hub.refusal import Refusal, bad_request
from hf_merge.demo.hub.store import Store
from hf_merge.demo.hub.uploading import Uploading
from hf_merge.demo.hub.writing import Writing, json_body


class _KindConvertor(Convertor[str]):
    regex = "|".join(KINDS)

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("kind", _KindConvertor())


def create_app(store: Store, accounts: Accounts, controls: Controls) -> ASGIApp:
    """The Hub over a store. Serve it with uvicorn."""
    gate = Gate(accounts)
    admin = _Admin(store, controls)
    routes = [
        *admin.routes(),
        *Gathering(store, gate).routes(),
        *Writing(store, gate).routes(),
        *Uploading(store, gate, _secret(store)).routes(),
        *Reading(store, gate).routes(),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            Refusal: _refuse,
            404: _no_such_route,
            405: _no_such_route,
            ClientDisconnect: _gone,
            Exception: _bug,
        },
    )
    app.router.redirect_slashes = False
    return Misbehavior(_RawPath(app), controls)


class _RawPath:
    """Lets routes match the path as it was sent: `trial%2F7` is one part of it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app({**scope, "path": scope["raw_path"].decode("ascii")}, receive, send)


def _secret(store: Store) -> bytes:
    """Signs upload addresses; kept, so that an upload can go on after a restart."""
    path = store.root / "secret"
    if not path.exists():
        store.write(path, secrets.token_bytes(32))
        path.chmod(0o600)
    return path.read_bytes()


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _no_such_route(request: Request, error: Exception) -> Response:
    return Refusal(404, f"The local Hub has no route {request.method} {request.url.path}").response()


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


async def _bug(request: Request, error: Exception) -> Response:
    # 501: clients repeat requests answered 500 for half a minute, and a bug would look like slowness.
    where = traceback.extract_tb(error.__traceback__)[-1]
    return Refusal(501, f"The local Hub failed: {type(error).__name__}: {error} ({where.name})").response()


class _Admin:
    """The routes below `/_local/`: faults, the record of requests, the repositories."""

    def __init__(self, store: Store, controls: Controls) -> None:
        self.store = store
        self.controls = controls

    def routes(self) -> list[Route]:
        return [
            Route("/_local/faults", self.faults, methods=["GET", "POST", "DELETE"]),
            Route("/_local/log", self.log, methods=["GET", "DELETE"]),
            Route("/_local/repos", self.repositories),
        ]

    async def faults(self, request: Request) -> Response:
        if request.method == "DELETE":
            self.controls.clear_faults()
        elif request.method == "POST":
            try:
                self.controls.add(as_fault(await json_body(request)))
            except ValueError as error:
                raise bad_request(str(error)) from None
        return JSONResponse([asdict(fault) for fault in self.controls.faults()])

    async def log(self, request: Request) -> Response:
        if request.method == "DELETE":
            self.controls.clear_requests()
        return JSONResponse([asdict(record) for record in self.controls.requests()])

    async def repositories(self, request: Request) -> Response:
        def collect() -> list[dict[str, object]]:
            return [
                {
                    "type": repository.kind[:-1],
                    "id": repository.repo_id,
                    "private": repository.state().private,
                    "refs": dict(repository.state().refs),
                }
                for repository in self.store.all()
            ]

        return JSONResponse(await run_in_threadpool(collect))
