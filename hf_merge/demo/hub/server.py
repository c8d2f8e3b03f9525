"""`LocalHub`: the Hub in a thread of this process or in a process of its own, with one interface."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol
from urllib.request import ProxyHandler, Request, build_opener

import uvicorn

from hf_merge.demo.hub.access import Accounts
from hf_merge.demo.hub.app import create_app
from hf_merge.demo.hub.faults import Controls, Fault, Kind, RequestRecord, bytes_served
from hf_merge.demo.hub.names import check_new_repo_id, check_path, kind_of
from hf_merge.demo.hub.store import State, Store, now

HOST = "127.0.0.1"
ACCOUNTS_VARIABLE = "HF_MERGE_LOCAL_HUB_ACCOUNTS"


class _Controls(Protocol):
    def add(self, fault: Fault) -> None: ...
    def clear_faults(self) -> None: ...
    def requests(self) -> list[RequestRecord]: ...
    def clear_requests(self) -> None: ...


class LocalHub:
    """A Hub on the loopback whose repositories lie under `root`; a later one on the same root goes on with them.

    Args:
        root: folder for everything the Hub keeps; created if absent.
        port: 0 picks a free one.
        users: token to user name; a user may write in the namespace of that name and in those of their organizations.
        organizations: name to members.
        read_only: tokens that may only read.

    `with LocalHub(root) as hub:` serves from a thread of this process, `with LocalHub.spawn(root) as hub:` from a
    process of its own. Clients other than `HfApi(endpoint=hub.endpoint)` need `hub.environment()` before they are
    imported.
    """

    def __init__(
        self,
        root: Path,
        *,
        port: int = 0,
        users: Mapping[str, str] | None = None,
        organizations: Mapping[str, Collection[str]] | None = None,
        read_only: Collection[str] = (),
    ) -> None:
        default = Accounts()
        self.root = Path(root)
        self.accounts = Accounts(
            users=default.users if users is None else users,
            organizations=default.organizations if organizations is None else organizations,
            read_only=read_only,
        )
        self.store = Store(self.root)
        self.port = port
        self.process: subprocess.Popen[str] | None = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._controls: _Controls = Controls()

    @property
    def endpoint(self) -> str:
        """`http://127.0.0.1:<port>`; known once the Hub has started."""
        if not self.port:
            raise RuntimeError("The Hub has no address before start()")
        return f"http://{HOST}:{self.port}"

    @property
    def token(self) -> str:
        """The token of the first user."""
        return next(iter(self.accounts.users))

    def environment(self) -> dict[str, str]:
        """What a client process needs besides a HF_HOME of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        }

    # Running

    def start(self) -> "LocalHub":
        """Serve from a thread of this process."""
        listener = _listen(self.port)
        self.port = listener.getsockname()[1]
        self.store.sweep()
        assert isinstance(self._controls, Controls)
        self._server = uvicorn.Server(_configuration(self.store, self.accounts, self._controls))
        run = self._server.run
        self._thread = threading.Thread(target=run, args=([listener],), name="local-hub", daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("The local Hub did not start")
            time.sleep(0.002)
        return self

    @classmethod
    def spawn(cls, root: Path, **arguments: Any) -> "LocalHub":
        """Serve from a new process, which ends with this one; returns when it answers. Arguments as for the class."""
        hub = cls(root, **arguments)
        command = [sys.executable, "-m", "hf_merge.demo.hub", "--root", str(hub.root), "--port", str(hub.port)]
        packages = str(Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, ACCOUNTS_VARIABLE: dump_accounts(hub.accounts)}
        hub.process = subprocess.Popen(
            [*command, "--until-stdin-closes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert hub.process.stdout is not None
        line = hub.process.stdout.readline()
        if not line.startswith("http://"):
            hub.stop()
            raise RuntimeError(f"The local Hub on {hub.root} did not start; its errors stand above")
        hub.port = int(line.strip().rpartition(":")[2])
        hub._controls = _RemoteControls(hub.endpoint)
        return hub

    def stop(self) -> None:
        """Stop serving; the repositories stay. Connections still busy after a second are closed."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join()
            self._server = self._thread = None
        if self.process is not None:
            with ExitStack() as stack:
                for stream in (self.process.stdin, self.process.stdout):
                    if stream is not None:
                        stack.callback(stream.close)
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def __enter__(self) -> "LocalHub":
        return self if self._thread or self.process else self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    # Contents

    def seed(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | Path] | Path,
        *,
        repo_type: str = "model",
        revision: str = "main",
        private: bool = False,
        gated: bool = False,
        message: str = "Seed",
        move: bool = False,
    ) -> str:
        """Commit files without a client and without HTTP; works at any time, before `start` as well.

        Args:
            files: path in the repository to content (bytes, text or a file on disk), or a folder to take whole.
            repo_type: model, dataset or space.
            revision: branch; one that does not exist starts at main.
            private, gated: settings of the repository, new or not.
            move: consume files on disk instead of copying them.

        Returns:
            sha of the commit.
        """
        kind = kind_of(repo_type)
        check_new_repo_id(repo_id)
        if self.store.exists(kind, repo_id):
            repository = self.store.get(kind, repo_id)
            repository.update(private=private, gated=gated)
        else:
            repository = self.store.create(kind, repo_id, State(created=now(), private=private, gated=gated))
        refs = repository.state().refs
        if f"refs/heads/{revision}" not in refs and refs:
            repository.create_reference("refs/heads/", revision, "main")
        entries = {}
        for path, content in _files(files).items():
            check_path(path)
            if isinstance(content, Path):
                entries[path] = repository.objects.add_file(path, content, move=move)
                continue
            temporary = self.store.temporary()
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            entries[path] = repository.objects.add_file(path, temporary, move=True)
        sha, _ = repository.commit(revision, title=message, add=entries)
        return sha

    # Misbehavior and records

    def fault(self, kind: Kind, path: str = "*", **arguments: Any) -> None:
        """Arm a fault; the arguments are those of `Fault`."""
        self._controls.add(Fault(kind=kind, path=path, **arguments))

    def clear_faults(self) -> None:
        """Behave from now on."""
        self._controls.clear_faults()

    def requests(self) -> list[RequestRecord]:
        """Requests since the start or the last `clear_requests`, oldest first."""
        return self._controls.requests()

    def clear_requests(self) -> None:
        """Forget the requests."""
        self._controls.clear_requests()

    def bytes_served(self, path: str = "*") -> int:
        """Bytes of the answers to requests whose path fits the glob (`*` crosses slashes)."""
        return bytes_served(self.requests(), path)


class _RemoteControls:
    """The controls of a Hub in another process."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        # Proxies of the environment must not see loopback traffic.
        self._opener = build_opener(ProxyHandler({}))

    def _call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self._endpoint + path, data, {"Content-Type": "application/json"}, method=method)
        with self._opener.open(request, timeout=30) as response:
            return json.load(response)

    def add(self, fault: Fault) -> None:
        self._call("POST", "/_local/faults", asdict(fault))

    def clear_faults(self) -> None:
        self._call("DELETE", "/_local/faults")

    def requests(self) -> list[RequestRecord]:
        return [RequestRecord(**record) for record in self._call("GET", "/_local/log")]

    def clear_requests(self) -> None:
        self._call("DELETE", "/_local/log")


def serve(root: Path, port: int, *, until_stdin_closes: bool = False) -> None:
    """Serve in the main thread until interrupted; prints the address as the first line."""
    text = os.environ.pop(ACCOUNTS_VARIABLE, None)
    accounts = Accounts(**json.loads(text)) if text else Accounts()
    store = Store(root)
    store.sweep()
    listener = _listen(port)
    server = uvicorn.Server(_configuration(store, accounts, Controls()))
    if until_stdin_closes:

        def wait() -> None:
            sys.stdin.read()
            server.should_exit = True

        threading.Thread(target=wait, daemon=True).start()
    print(f"http://{HOST}:{listener.getsockname()[1]}", flush=True)
    server.run([listener])


def _listen(port: int) -> socket.socket:
    listener = socket.create_server((HOST, port), backlog=2048)
    # Inherited by every connection. asyncio does not set it here, and without it each small answer takes 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def dump_accounts(accounts: Accounts) -> str:
    """The accounts for the environment of another process; they never go to disk."""
    organizations = {name: list(members) for name, members in accounts.organizations.items()}
    return json.dumps({"users": dict(accounts.users), "organizations": organizations, "read_only": list(accounts.read_only)})


def _configuration(store: Store, accounts: Accounts, controls: Controls) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(store, accounts, controls),
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )


def _files(files: Mapping[str, bytes | str | Path] | Path) -> Mapping[str, bytes | str | Path]:
    if isinstance(files, Mapping):
        return files
    if not files.is_dir():
        raise ValueError(f"{files} is not a folder")
    found = (path for path in sorted(files.rglob("*")) if path.is_file() and ".git" not in path.parts)
    return {path.relative_to(files).as_posix(): path for path in found}
