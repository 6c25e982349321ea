"""The command in a process of its own: signals, sockets that misbehave, and options."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.banks import SHAPE, images, make_bank, make_base
from weft.bank import Bank
from weft.cli.serving import size_in_bytes
from weft.errors import ConfigError
from weft.serving import Server
from weft.serving.inputs import InputSpec
from weft.serving.settings import Settings

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
from serving.processes import NET, ServerProcess, ServerThread  # noqa: E402
from weft.serving.http import create_app  # noqa: E402
from weft.serving.process import listen  # noqa: E402

NAMES = ("a", "b", "c", "d")
SHAPED = ("--input-shape", "3,6,6")


@pytest.fixture(scope="module")
def banked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    bank, model = make_bank(tmp_path_factory.mktemp("process"))
    return bank.path, model


@pytest.fixture(scope="module")
def running(banked: tuple[Path, Any]) -> Iterator[ServerProcess]:
    options = ("--max-body", "50KB", "--body-timeout", "0.5", "--max-delay-ms", "1")
    with ServerProcess(banked[0], *SHAPED, *options) as process:
        yield process


def asked(client: Any, url: str, task: str, x: Tensor) -> Any:
    return client.post(f"{url}/v1/tasks/{task}/predict", json={"inputs": x.tolist()})


def right(response: Any, expected: Tensor) -> bool:
    found = torch.tensor([a["output"] for a in response.json()["answers"]])
    return torch.allclose(found, expected, atol=1e-5)


def test_the_command_serves_what_the_bank_holds(
    running: ServerProcess, banked: tuple[Path, Any]
) -> None:
    x = images(2)
    with httpx.Client() as client, torch.no_grad():
        for name in NAMES:
            assert right(asked(client, running.url, name, x), banked[1](x, task=name))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_under_load_loses_no_accepted_request(
    number: int, banked: tuple[Path, Any]
) -> None:
    bank, model = banked
    xs = {name: images(1) for name in NAMES}
    with torch.no_grad():
        expected = {name: model(xs[name], task=name) for name in NAMES}
    answers: list[Any] = []
    lost: list[str] = []
    options = ("--max-batch", "4", "--max-delay-ms", "20")
    with ServerProcess(bank, *SHAPED, *options) as process:
        stopped = threading.Event()

        def client(i: int) -> None:
            name = NAMES[i % 4]
            with httpx.Client(timeout=30) as session:
                while True:
                    late = stopped.is_set()
                    try:
                        response = asked(session, process.url, name, xs[name])
                    except httpx.ConnectError:  # it was never accepted
                        return
                    except httpx.TransportError as error:
                        lost.append(f"{type(error).__name__} {'after' if late else 'before'}")
                        return
                    answers.append((name, response))

        threads = [threading.Thread(target=client, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        while len(answers) < 60:
            time.sleep(0.01)
        stopped.set()
        process.terminate(number)
        code, said = process.ended()
        for thread in threads:
            thread.join(60)
    assert code == 0, said
    assert "Traceback" not in said
    assert not lost
    assert {response.status_code for _, response in answers} <= {200, 503}
    good = [(name, response) for name, response in answers if response.status_code == 200]
    wrong = [(n, r.json(), expected[n]) for n, r in good if not right(r, expected[n])]
    assert not wrong, wrong[0]
    counts = re.search(r"(\d+) requests accepted, (\d+) answered", said)
    assert counts is not None, said
    assert int(counts[1]) == int(counts[2]) == len(good)


def raw(port: int, *parts: bytes, wait: float = 0.0, end: bool = True) -> bytes:
    """Send bytes in pieces and read what comes back until the connection ends or is silent."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
        try:
            for part in parts:
                link.sendall(part)
                time.sleep(wait)
            if end:
                link.shutdown(socket.SHUT_WR)
            link.settimeout(2)
            while piece := link.recv(65536):
                received += piece
        except OSError:  # it closed the connection, or is silent
            pass
    return received


HEAD = b"POST /v1/tasks/a/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_connections_that_misbehave_leave_it_serving(
    running: ServerProcess, banked: tuple[Path, Any]
) -> None:
    port = running.port
    raw(port, b"")
    raw(port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # TLS where there is none
    assert b"400" in raw(port, b"NONSENSE\r\n\r\n")
    raw(port, b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"b" * 200_000 + b"\r\n\r\n")
    raw(port, HEAD + b"Content-Length: 1000\r\n\r\n{")  # cut in the body
    raw(port, HEAD[:50])  # cut in the header
    assert b"413" in raw(port, HEAD + b"Content-Length: 99999999999\r\n\r\n", end=False)
    assert b" 400 " in raw(port, HEAD + b"Content-Length: -5\r\n\r\n")
    chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
    endless = raw(port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 60, end=False)
    assert b"413" in endless
    assert b" 400 " in raw(port, HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    slow = raw(port, HEAD + b"Content-Length: 10\r\n\r\n", b"{", wait=0.1, end=False)
    assert b"408" in slow
    assert b"too_slow" in slow
    x = images(1)
    with httpx.Client() as client, torch.no_grad():
        assert right(asked(client, running.url, "a", x), banked[1](x, task="a"))
        assert client.get(f"{running.url}/readyz").status_code == 200
    assert running.process.poll() is None
    assert "Traceback" not in "".join(running.errors)


def test_slow_connections_do_not_keep_others_waiting(running: ServerProcess) -> None:
    links = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(100)]
    try:
        for i, link in enumerate(links):
            link.sendall(HEAD if i % 2 else HEAD + b"Content-Length: 100\r\n\r\n{")
        with httpx.Client() as client:
            start = time.monotonic()
            assert asked(client, running.url, "a", images(1)).status_code == 200
            assert time.monotonic() - start < 2
    finally:
        for link in links:
            link.close()


def ways() -> list[str]:
    """Addresses of this machine."""
    found = ["127.0.0.1"]
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return found
    return [*found, "::1"]


@pytest.mark.parametrize("host", ways())
def test_the_end_of_an_answer_is_not_held_back(host: str) -> None:
    async def work() -> int:
        found = asyncio.get_running_loop().create_future()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                link = transport.get_extra_info("socket")
                found.set_result(link.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

        listener = listen(host, 0)
        server = await asyncio.get_running_loop().create_server(Protocol, sock=listener)
        _, writer = await asyncio.open_connection(host, listener.getsockname()[1])
        try:
            return await asyncio.wait_for(found, 10)
        finally:
            writer.close()
            server.close()

    assert asyncio.run(work()) == 1


ASKED = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def unread(port: int) -> socket.socket:
    """A connection that asks for much and reads nothing."""
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    link.connect(("127.0.0.1", port))
    link.settimeout(60)
    link.sendall(ASKED)
    link.recv(1)  # it serves
    link.settimeout(0.3)
    with suppress(OSError):
        for _ in range(400):
            link.sendall(ASKED * 50)
    return link


def test_a_client_that_does_not_read_keeps_no_server_alive(banked: tuple[Path, Any]) -> None:
    with ServerProcess(banked[0], *SHAPED) as process, unread(process.port):
        start = time.monotonic()
        process.terminate()
        time.sleep(0.2)
        process.terminate()  # a parent may hand on what the terminal has sent as well
        code, said = process.ended()
        assert code == 0, said
        assert 5 < time.monotonic() - start < 15
        assert "Traceback" not in said


def test_a_second_signal_ends_it_at_once(banked: tuple[Path, Any]) -> None:
    with ServerProcess(banked[0], *SHAPED) as process, unread(process.port):
        process.terminate()
        time.sleep(1.5)
        start = time.monotonic()
        process.terminate(signal.SIGINT)
        code, said = process.ended()
        assert (code, time.monotonic() - start < 3) == (130, True), said
        assert "Ended at once" in said


def test_clients_that_read_nothing_are_left_and_slow_ones_are_not(
    banked: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.serving.process.PATIENCE", 0.7)
    app = create_app(Server(Bank(banked[0]), make_base()), Settings(InputSpec(shape=SHAPE)))
    with ServerThread(app) as served:
        with unread(served.port):
            wait_for(lambda: served.connections == 1)
            wait_for(lambda: served.connections == 0)
        with socket.create_connection(("127.0.0.1", served.port), timeout=5) as slow:
            slow.sendall(ASKED * 1000)
            until, received = time.monotonic() + 3, 0
            while time.monotonic() < until:
                received += len(slow.recv(40_000))
                time.sleep(0.02)
            assert received > 500_000
            assert served.connections == 1
        idle = socket.create_connection(("127.0.0.1", served.port))
        idle.sendall(ASKED)
        wait_for(lambda: served.connections == 0)
        idle.close()


def wait_for(condition: Callable[[], bool], seconds: float = 15) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_requests_of_closed_connections_are_dropped_before_they_run(
    banked: tuple[Path, Any],
) -> None:
    server = Server(Bank(banked[0]), make_base())
    app = create_app(server, Settings(InputSpec(shape=SHAPE), max_delay=400.0))
    body = f'{{"inputs": {images(1).tolist()}}}'.encode()
    whole = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    with ServerThread(app) as served, httpx.Client() as client:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", served.port)) as link:
                link.sendall(whole)
                time.sleep(0.02)
        assert asked(client, served.url, "a", images(1)).status_code == 200
        assert "\nweft_rows_total 1.0" in client.get(f"{served.url}/metrics").text
        batcher = app.state.service.batcher
        assert (batcher.accepted, batcher.answered, batcher.waiting) == (6, 1, 0)


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], banked: tuple[Path, Any]
) -> Callable[..., tuple[Any, str]]:
    """Run ``weft serve`` up to where it would serve: ``command(...) -> (application, said)``."""
    import weft.serving.process
    from weft import cli

    net = banked[0].parent / "net.py"
    net.write_text(NET)

    def run(*options: object, bank: Path = banked[0], base: str = f"python:{net}:make") -> Any:
        served: list[Any] = []

        def keep(app: Any, listener: socket.socket) -> None:
            served.append(app)
            listener.close()

        arguments = ["serve", bank, "--base", base, "--port", "0", *options]
        monkeypatch.setattr("sys.argv", ["weft", *map(str, arguments)])
        monkeypatch.setattr(weft.serving.process, "run", keep)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        assert bool(stop.value.code) != bool(served)
        return (served or [None])[0], said.out + said.err.replace("\n", " ")

    return run


def test_options_reach_the_server(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_TOKEN", "secret")
    options = ("--max-bytes", "5KB", "--pin", "b", "--half", "--host", "0.0.0.0", "--max-queue", 7)
    images = ("--image-size", 6, "--mean", "0.1,0.2,0.3", "--std", "1,1,2", "--max-delay-ms", "2.5")
    app, said = command(*options, *images, "--one-task-at-a-time", "--max-body", "2KB")
    assert "can be reached by others" not in said
    assert "Serving 4 tasks at http://0.0.0.0:" in said
    service = app.state.service
    server, settings = service.server, service.settings
    assert server.pinned == {"b"}
    assert server.half
    assert (settings.token, settings.max_queue, settings.max_delay) == ("secret", 7, 2.5)
    assert not settings.mixed
    assert settings.limits.body == 2000
    assert settings.inputs.shape == (3, 6, 6)
    assert settings.inputs.preprocessing.mean == (0.1, 0.2, 0.3)
    monkeypatch.delenv("WEFT_TOKEN")
    app, said = command("--host", "0.0.0.0")
    assert "can be reached by others, and there is no token" in said
    assert app.state.service.settings.inputs.shape is None
    app, _ = command("--input-shape", "5", "--input-type", "int64")
    assert app.state.service.settings.inputs.preprocessing is None


def test_what_cannot_be_served_is_said_at_once(command: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text("from torch import nn\ndef make():\n    return nn.Linear(2, 2)\n")
    taken = socket.create_server(("127.0.0.1", 0))
    cases = {
        ("--pin", "e"): "no task 'e'",
        ("--max-bytes", "lots"): "A size is a number",
        ("--max-bytes", "1KB", "--pin", "c"): "max_bytes=1,000",
        ("--mean", "x"): "--mean takes numbers",
        ("--base-option", "x"): "--base-option is KEY=VALUE",
        ("--input-type", "float16"): "Inputs are of float32 or int64",
        ("--port", str(taken.getsockname()[1])): "Cannot listen on",
        ("--token", " "): "The token is empty",
        ("--device", "foo"): "--device: torch cannot use 'foo' here",
        ("--input-shape", "3,-1,2"): "--input-shape: A row has the shape [3, -1, 2]",
        ("--input-shape", "0"): "--input-shape: A row has the shape [0]",
        ("--input-shape", ""): "--input-shape takes numbers",
        ("--input-shape", "3,9999999,9999999"): "up to 100,000,000 numbers",
        ("--image-size", "99999999"): "up to 100,000,000 numbers",
        ("--base-option", "a=["): "--base-option a: '[' is no YAML value",
        ("--max-bytes", "9" * 400): "less than 8 EiB",
    }
    with taken:
        for options, message in cases.items():
            app, said = command(*options)
            assert app is None
            assert message in said
    assert "no bank at" in command(bank=tmp_path / "nowhere")[1]
    assert "stand on another base" in " ".join(command(base=f"python:{other}:make")[1].split())


def test_images_are_prepared_as_in_training(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, _ = make_bank(tmp_path, "a")
    info = Bank.info

    def with_facts(self: Bank, task: str) -> Any:
        found = info(self, task)
        section = {"mean": [0.1, 0.1, 0.1], "std": [0.3, 0.3, 0.3]}
        found["facts"]["experiment"] = {"base": section, "data": {"image_size": 6}, "seed": 3}
        return found

    monkeypatch.setattr(Bank, "info", with_facts)
    inputs = command(bank=bank.path)[0].state.service.settings.inputs
    assert inputs.preprocessing.std == (0.3, 0.3, 0.3)
    assert (inputs.image_size, inputs.shape) == (6, (3, 6, 6))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"seed": "x", "base": {}}, "seed='x'; expected a int"),
        ({"base": "net"}, "base='net'; expected a dict"),
        ({"base": {"mean": [None]}}, "mean='[None]'; expected a list of numbers"),
        ({"base": {"std": 3}}, "std='3'; expected a list"),
        ({"base": {}, "data": [1]}, "data='[1]'; expected a dict"),
        ({"base": {}, "data": {"image_size": "6"}}, "image_size='6'; expected a int"),
        ("run 7", None),
        ({"run": 7, "seed": "words of my own"}, None),
    ],
)
def test_facts_of_a_wrong_type_are_named(
    facts: Any, message: str | None, command: Any, tmp_path: Path
) -> None:
    bank, model = make_bank(tmp_path, "a")
    model.tasks["a"].facts["experiment"] = facts
    bank.save(model)
    app, said = command(bank=bank.path)
    assert (app is None) == (message is not None)
    if message is not None:
        assert "error: The bank's task says of its training" in said
        assert message in " ".join(said.split())


def test_what_guards_a_server_of_this_machine(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = command("--allow-host", "net.example")[0].state.service.settings
    assert set(settings.hosts) == {"127.0.0.1", "localhost", "::1", "net.example"}
    assert settings.max_queue_bytes == 512_000_000
    assert command("--host", "0.0.0.0")[0].state.service.settings.hosts is None
    monkeypatch.setenv("WEFT_TOKEN", " secret\n")
    settings = command("--max-answers", 7)[0].state.service.settings
    assert (settings.token, settings.hosts, settings.max_answers) == ("secret", None, 7)


def test_sizes_are_read_as_people_write_them() -> None:
    cases = {"4096": 4096, "256MB": 256 * 10**6, "1.5 GiB": 3 * 2**29, "10kb": 10_000}
    assert {text: size_in_bytes(text) for text in cases} == cases
    for text in ("", "MB", "-1", "1 zb", "0", "1e9"):
        with pytest.raises(ConfigError, match="A size is"):
            size_in_bytes(text)


def test_a_missing_extra_names_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from weft.errors import MissingExtra

    for name in [n for n in sys.modules if n in ("weft.serving.http", "weft.serving.process")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    import importlib

    for name in ("weft.serving.http", "weft.serving.process"):
        with pytest.raises(MissingExtra, match=r"pip install 'weft-share\[serve\]'"):
            importlib.import_module(name)
