"""A real server process on a free port of this machine, for tests and benchmarks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

from weft.serving.process import configured, listen

NET = """
from serving.banks import make_base

def make():
    return make_base()
"""


class ServerProcess:
    """``weft serve`` in a process of its own; ends with the ``with`` block.

    Args:
        bank: the bank's folder.
        options: further arguments of the command.
        base: the option ``--base``; default the base of the tests' banks.
        env: further variables of its environment.
    """

    def __init__(
        self, bank: Path, *options: str, base: str | None = None, env: dict[str, str] | None = None
    ) -> None:
        if base is None:
            net = bank.parent / "net.py"
            net.write_text(NET)
            base = f"python:{net}:make"
        tests = str(Path(__file__).parent.parent)
        command = [sys.executable, "-m", "weft", "serve", str(bank), "--base", base]
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--threads", "1", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": tests, **(env or {})},
        )
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        found = re.search(r"http://(.+):(\d+)/", said)
        if found is None:
            self.process.wait(30)
            self._reader.join(5)
            raise AssertionError(f"no address in {said!r}: {''.join(self.errors)}")
        self.port = int(found[2])
        self.url = f"http://127.0.0.1:{self.port}"

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)

    def terminate(self, number: int = signal.SIGTERM) -> None:
        """Ask it to end."""
        self.process.send_signal(number)

    def ended(self) -> tuple[int, str]:
        """Its exit status, once it has ended, and what it wrote to standard error."""
        code = self.process.wait(60)
        self._reader.join(5)
        return code, "".join(self.errors)


class ServerThread:
    """An application on a free port, served by a thread of this process.

    Args:
        app: made by `create_app`.
    """

    def __init__(self, app: Any) -> None:
        listener = listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(configured(app))
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._server.server_state.connections)

    def __enter__(self) -> ServerThread:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
