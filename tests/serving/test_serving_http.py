"""The HTTP interface: right answers, and refusals that are clear and leave it serving."""

from __future__ import annotations

import io
import json
import logging
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import weft
from serving.banks import SHAPE, add_tasks, disturb, images, make_bank, make_base, size
from weft.bank import Bank
from weft.data import Preprocessing
from weft.serving import Server
from weft.serving.inputs import InputSpec, Limits
from weft.serving.settings import Settings

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from weft.serving.http import create_app

PIXELS = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
SPEC = InputSpec(shape=SHAPE, image_size=6, preprocessing=PIXELS)
NAMES = ("a", "b", "c", "d")


def client_of(server: Server, **settings: Any) -> TestClient:
    """A client of a server with these settings."""
    settings = {"inputs": SPEC, "max_batch": 8, "max_delay": 1.0, **settings}
    return TestClient(create_app(server, Settings(**settings)), raise_server_exceptions=False)


class World:
    """A bank, the model of its tasks, its server, and a client of it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.bank, self.model = make_bank(folder)
        self.server = Server(self.bank, make_base())
        self.client = client_of(self.server, **settings)

    def expected(self, x: Tensor, task: str) -> Tensor:
        with torch.no_grad():
            return self.model(x, task=task)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("http"))
    with made.client:
        yield made


def png(side: int = 9) -> bytes:
    """An encoded image."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A tiny PNG whose header claims very many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def refusal(response: Any, status: int, code: str) -> str:
    """The message of a refusal, after checking that it is one of this kind."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message"}
    assert body["error"]["code"] == code
    assert "Traceback" not in response.text
    assert "/bank" not in response.text
    return str(body["error"]["message"])


def close(found: Any, expected: Tensor) -> bool:
    return torch.allclose(torch.tensor(found), expected, atol=1e-5)


# ------------------------------------------------------------------------------- right answers


def test_one_row_and_several_rows_of_a_task(world: World) -> None:
    x = images(3)
    for given, rows in ((x[0].tolist(), x[:1]), (x.tolist(), x)):
        response = world.client.post("/v1/tasks/b/predict", json={"inputs": given})
        assert response.status_code == 200
        answers = response.json()["answers"]
        expected = world.expected(rows, "b")
        assert len(answers) == len(rows)
        for answer, output in zip(answers, expected, strict=True):
            assert (answer["task"], answer["kind"]) == ("b", "classification")
            assert close(answer["output"], output)
            chances = {c["name"]: c["probability"] for c in answer["classes"]}
            assert sorted(chances) == ["b 0", "b 1", "b 2"]
            assert close([chances[f"b {i}"] for i in range(3)], output.softmax(0))
            listed = [c["probability"] for c in answer["classes"]]
            assert listed == sorted(listed, reverse=True)
    top = world.client.post("/v1/tasks/b/predict?top=2", json={"inputs": x.tolist()}).json()
    assert all(len(a["classes"]) == 2 and len(a["output"]) == 3 for a in top["answers"])


def test_a_task_per_row_and_all_tasks(world: World) -> None:
    x = images(4)
    names = ["d", "a", "a", "c"]
    response = world.client.post("/v1/predict", json={"inputs": x.tolist(), "tasks": names})
    for i, (answer, name) in enumerate(zip(response.json()["answers"], names, strict=True)):
        assert answer["task"] == name
        assert close(answer["output"], world.expected(x[i : i + 1], name)[0])
    for tasks in (None, ["c", "b"]):
        body = {"inputs": x[:2].tolist()} | ({} if tasks is None else {"tasks": tasks})
        found = world.client.post("/v1/predict_all", json=body).json()["answers"]
        assert len(found) == 2
        for i, row in enumerate(found):
            assert [a["task"] for a in row] == (tasks or list(NAMES))
            assert all(close(a["output"], world.expected(x[:2], a["task"])[i]) for a in row)


def test_images_are_decoded_as_in_training(world: World) -> None:
    from weft.data.images import decode_one

    data = png()
    pixels = torch.from_numpy(decode_one(data, 6).copy()).permute(2, 0, 1)[None]
    expected = world.expected(PIXELS(pixels), "c")[0]
    raw = world.client.post(
        "/v1/tasks/c/predict", content=data, headers={"content-type": "image/png"}
    )
    form = world.client.post("/v1/tasks/c/predict", files={"image": ("x.png", data, "image/png")})
    for response in (raw, form):
        assert response.status_code == 200, response.text
        assert close(response.json()["answers"][0]["output"], expected)
    several = world.client.post(
        "/v1/predict_all",
        files=[("image", ("x.png", data)), ("image", ("y.png", data))],
        data={"tasks": ["c", "a"]},
    ).json()["answers"]
    assert [[a["task"] for a in row] for row in several] == [["c", "a"]] * 2
    assert close(several[1][0]["output"], expected)
    every = world.client.post(
        "/v1/predict_all", content=data, headers={"content-type": "image/png"}
    )
    assert [a["task"] for a in every.json()["answers"][0]] == list(NAMES)


def test_other_kinds_of_tasks_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    base = make_base()
    model = weft.MultiTaskModel(base, weft.scale_bias(base), example=images(1))
    model.add_task("yes", weft.Binary())
    model.add_task("labels", weft.Binary(["x", "y"]))
    model.add_task("age", weft.Regression())
    model.add_task("map", weft.Segmentation(2))
    model.add_task("broken", weft.Classification(2))
    with torch.no_grad():
        model.head("broken").linear.bias[1] = float("nan")
    bank = Bank(tmp_path)
    bank.save(model)
    x = images(1)
    with client_of(Server(bank, base)) as client:
        answers = client.post("/v1/predict_all", json={"inputs": x.tolist()}).json()["answers"][0]
    found = {a["task"]: a for a in answers}
    model.eval()
    assert close(found["yes"]["classes"][0]["probability"], model(x, task="yes")[0].sigmoid())
    assert found["yes"]["classes"][0]["name"] == "yes"
    assert {c["name"] for c in found["labels"]["classes"]} == {"x", "y"}
    assert found["age"]["classes"] is None
    assert close(found["age"]["output"], model(x, task="age")[0])
    assert close(found["map"]["output"], model(x, task="map")[0])
    assert found["broken"]["output"][1] is None
    assert found["broken"]["classes"][0]["probability"] is None


def test_listing_tasks_reads_no_tensors(tmp_path: Path) -> None:
    bank, _ = make_bank(tmp_path, *(f"task {i}" for i in range(12)))
    server = Server(bank, make_base(), pinned=["task 3"])
    document = bank.path / "tasks" / "task 5" / "bundle.json"
    document.write_text("{}")
    with client_of(server) as client:
        page = client.get("/v1/tasks?offset=2&limit=5").json()
        assert (page["total"], page["offset"]) == (12, 2)
        assert [t["name"] for t in page["tasks"]] == [f"task {i}" for i in range(2, 7)]
        rows = {t["name"]: t for t in page["tasks"]}
        assert rows["task 5"]["problem"] == "Its bundle cannot be read."
        assert rows["task 3"]["pinned"]
        assert rows["task 3"]["resident"]
        assert rows["task 4"]["metrics"] == {"val": {"accuracy": 0.54}}
        assert rows["task 4"]["own_bytes"] == bank.ledger("task 4").own_bytes
        assert client.get("/v1/tasks?match=K 1").json()["total"] == 3
        one = client.get("/v1/tasks/task 4").json()
        ledger = bank.ledger("task 4")
        assert one["class_names"] == ["task 4 0", "task 4 1", "task 4 2"]
        assert sum(layer["own"] for layer in one["layers"]) == sum(r.own for r in ledger.rows)
        assert {layer["site"] for layer in one["layers"]} == {r.site for r in ledger.rows}
    assert server.resident == ("task 3",)


def test_refresh_brings_new_tasks(tmp_path: Path) -> None:
    made = World(tmp_path)
    with made.client as client:
        add_tasks(made.bank, "new")
        made.bank.remove("a")
        message = refusal(client.get("/v1/tasks/new"), 404, "unknown_task")
        assert "no task 'new'" in message
        found = client.post("/v1/refresh").json()
        assert found == {"added": ["new"], "removed": ["a"], "changed": []}
        assert client.get("/v1/tasks/new").status_code == 200
        body = {"inputs": images(1).tolist()}
        assert client.post("/v1/tasks/new/predict", json=body).status_code == 200
        refusal(client.post("/v1/tasks/a/predict", json=body), 404, "unknown_task")


def test_health_readiness_info_and_metrics(world: World) -> None:
    world.client.post("/v1/tasks/a/predict", json={"inputs": images(1).tolist()})
    assert world.client.get("/healthz").json() == {"status": "ok"}
    assert world.client.get("/readyz").json() == {"status": "ready"}
    info = world.client.get("/v1/info").json()
    assert info["input_shape"] == list(SHAPE)
    assert info["tasks"] == 4
    for i in range(30):
        world.client.get(f"/v1/tasks/unknown{i}")
        world.client.get(f"/nowhere/{i}")
    text = world.client.get("/metrics").text
    for name in (
        "weft_requests_total", "weft_rows_total", "weft_batch_rows_bucket", "weft_queue_length",
        "weft_request_seconds_bucket", "weft_resident_bytes", "weft_loads_total",
        "weft_evictions_total", "weft_errors_total",
    ):  # fmt: skip
        assert f"\n{name}" in text, name
    assert 'endpoint="/v1/tasks/{task}",status="404"' in text
    assert "unknown1" not in text
    assert "nowhere" not in text


# ------------------------------------------------------------------------------------- refusals


BODIES = {
    "no JSON": (b"{", 400, "malformed"),
    "nothing": (b"", 400, "malformed"),
    "bytes that are no text": (b"\xff\xfe\x00", 400, "malformed"),
    "NaN": (b'{"inputs": [NaN]}', 400, "malformed"),
    "Infinity": (b'{"inputs": [-Infinity]}', 400, "malformed"),
    "depth": (b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "malformed"),
    "some depth": (b'{"inputs": ' + b"[" * 60 + b"1" + b"]" * 60 + b"}", 422, "invalid_input"),
    "too many digits": (b'{"inputs": [' + b"9" * 5000 + b"]}", 400, "malformed"),
    "no object": (b"[1, 2]", 422, "invalid_input"),
    "no inputs": (b"{}", 422, "invalid_input"),
    "a strange key": (b'{"inputs": [[1]], "input": 1}', 422, "invalid_input"),
    "a word": (b'{"inputs": "cat"}', 422, "invalid_input"),
    "words": (b'{"inputs": [["a"]]}', 422, "invalid_input"),
    "null": (b'{"inputs": [[null]]}', 422, "invalid_input"),
    "objects": (b'{"inputs": [{"a": 1}]}', 422, "invalid_input"),
    "empty": (b'{"inputs": []}', 422, "invalid_input"),
    "empty rows": (b'{"inputs": [[], []]}', 422, "invalid_input"),
    "ragged": (b'{"inputs": [[1, 2], [3]]}', 422, "invalid_input"),
    "another shape": (b'{"inputs": [[1, 2], [3, 4]]}', 422, "invalid_input"),
}


@pytest.mark.parametrize("case", BODIES)
def test_json_that_cannot_be_used_is_refused(case: str, world: World) -> None:
    body, status, code = BODIES[case]
    response = world.client.post(
        "/v1/tasks/a/predict", content=body, headers={"content-type": "application/json"}
    )
    refusal(response, status, code)


def row(value: str) -> bytes:
    """A body with one row in which one number is this."""
    numbers = json.dumps(images(1).tolist())
    first = numbers.index("]")
    before, after = numbers[: numbers.rindex(",", 0, first)], numbers[first:]
    return f'{{"inputs": {before}, {value}{after}}}'.encode()


@pytest.mark.parametrize("value", ["true", "1e39", "1e400", "9" * 30, "null", '"1"', "[1]"])
def test_a_single_number_that_is_none_is_found(value: str, world: World) -> None:
    headers = {"content-type": "application/json"}
    right = world.client.post("/v1/tasks/a/predict", content=row("0.5"), headers=headers)
    assert right.status_code == 200, right.text
    response = world.client.post("/v1/tasks/a/predict", content=row(value), headers=headers)
    refusal(response, 422, "invalid_input")


def test_unknown_tasks_and_paths_never_reach_the_files(world: World) -> None:
    body = {"inputs": images(1).tolist()}
    (world.bank.path / "tasks" / "hidden").mkdir(exist_ok=True)
    for name in ("hidden", "%2e%2e", "..%2f..%2fbank.json", "%00", "a%00", "A", "x" * 5000):
        for path in (f"/v1/tasks/{name}", f"/v1/tasks/{name}/predict"):
            response = world.client.request("POST" if "predict" in path else "GET", path, json=body)
            assert response.status_code in (404, 405), (name, response.text)
            assert set(response.json()) == {"error"}
    hint = refusal(
        world.client.post("/v1/predict", json=body | {"tasks": ["../a"]}), 404, "unknown_task"
    )
    assert "'../a'" in hint
    refusal(world.client.post("/v1/predict_all", json=body | {"tasks": ["e"]}), 404, "unknown_task")
    refusal(world.client.get("/v1"), 404, "not_found")
    refusal(world.client.delete("/v1/tasks"), 405, "method_not_allowed")


@pytest.mark.parametrize("tasks", ["a", [], [1], [None], [["a"]], ["a", "a"], {"a": 1}, [True]])
def test_tasks_of_rows_are_one_name_each(tasks: Any, world: World) -> None:
    body = {"inputs": images(1).tolist(), "tasks": tasks}
    refusal(world.client.post("/v1/predict", json=body), 422, "invalid_input")


def test_wrong_types_of_bodies_are_refused(world: World) -> None:
    for media in ("text/plain", "", "application/jsonx", "image/svg+xml", "application/pickle"):
        headers = {"content-type": media}
        response = world.client.post("/v1/tasks/a/predict", content=b"x", headers=headers)
        assert "application/json" in refusal(response, 415, "unsupported_media_type")
    response = world.client.post(
        "/v1/predict", content=png(), headers={"content-type": "image/png"}
    )
    refusal(response, 415, "unsupported_media_type")
    for body in (b"", b"--x\r\n\r\n", b"--x\r\nContent-Disposition: form-data\r\n\r\n\r\n--x--"):
        headers = {"content-type": "multipart/form-data; boundary=x"}
        response = world.client.post("/v1/tasks/a/predict", content=body, headers=headers)
        assert response.status_code in (400, 422)
        assert set(response.json()) == {"error"}
    headers = {"content-type": "multipart/form-data"}
    response = world.client.post("/v1/tasks/a/predict", content=b"x", headers=headers)
    refusal(response, 400, "malformed")
    response = world.client.post("/v1/tasks/a/predict", files={"picture": png()})
    refusal(response, 422, "invalid_input")
    response = world.client.post("/v1/tasks/a/predict", files={"image": (None, "text")})
    refusal(response, 422, "invalid_input")


def test_bombs_of_pixels_are_refused_from_their_header(world: World) -> None:
    headers = {"content-type": "image/png"}
    for data in (bomb(), bomb(9000, 9000), bomb(2**31 - 1, 1)):
        response = world.client.post("/v1/tasks/a/predict", content=data, headers=headers)
        assert "pixels" in refusal(response, 413, "too_large")
    response = world.client.post("/v1/tasks/a/predict", files={"image": ("x", bomb())})
    refusal(response, 413, "too_large")
    whole = png()
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    for data in (whole[:40], whole[:-30], b"GIF89a", b"", postscript):
        response = world.client.post("/v1/tasks/a/predict", content=data, headers=headers)
        refusal(response, 422, "invalid_input")


def test_bodies_rows_and_numbers_are_limited(tmp_path: Path) -> None:
    limits = Limits(body=20_000, numbers=1500)
    made = World(tmp_path, limits=limits, max_batch=4)
    with made.client as client:
        headers = {"content-type": "application/json"}
        response = client.post("/v1/tasks/a/predict", content=b"x" * 20_001, headers=headers)
        refusal(response, 413, "too_large")

        def chunks() -> Iterator[bytes]:
            for _ in range(30):
                yield b"x" * 1000

        response = client.post(
            "/v1/tasks/a/predict", content=chunks(), headers={"content-type": "image/png"}
        )
        refusal(response, 413, "too_large")
        body = {"inputs": [[[[1] * 6] * 6] * 3] * 5}
        assert "5 rows" in refusal(
            client.post("/v1/tasks/a/predict", json=body), 422, "invalid_input"
        )
        body = {"inputs": [[[[1] * 6] * 6] * 3] * 20}
        assert "values" in refusal(client.post("/v1/tasks/a/predict", json=body), 413, "too_large")
        refusal(client.get("/v1/tasks?limit=0"), 422, "invalid_input")
        refusal(client.get("/v1/tasks?limit=100000"), 422, "invalid_input")
        refusal(client.post("/v1/tasks/a/predict?top=x", json={}), 422, "invalid_input")


def test_a_full_queue_answers_503_and_says_when_to_come_again(tmp_path: Path) -> None:
    made = World(tmp_path, max_queue=2, max_batch=1, max_delay=0)
    entered, leave = threading.Event(), threading.Event()
    inner = made.server.answers

    def slow(*given: Any) -> Any:
        entered.set()
        assert leave.wait(30)
        return inner(*given)

    made.server.__dict__["answers"] = slow
    body = {"inputs": images(1).tolist()}
    statuses: list[int] = []
    with made.client as client:

        def ask() -> None:
            statuses.append(client.post("/v1/tasks/a/predict", json=body).status_code)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        threads[0].start()
        assert entered.wait(30)
        for thread in threads[1:]:
            thread.start()
        batcher = client.app.state.service.batcher
        while batcher.waiting < 2:
            pass
        response = client.post("/v1/tasks/a/predict", json=body)
        refusal(response, 503, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        assert client.get("/healthz").status_code == 200
        leave.set()
        for thread in threads:
            thread.join(30)
        assert statuses == [200] * 3


def test_damaged_bundles_and_tasks_without_room_are_503_and_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bank, model = make_bank(tmp_path)
    (bank.path / "tasks" / "b" / "own.safetensors").write_bytes(b"")
    cap = max(size(bank, "a"), size(bank, "d"))
    assert size(bank, "c") > cap
    x = images(1)
    body = {"inputs": x.tolist()}
    with (
        client_of(Server(bank, make_base(), max_bytes=cap)) as client,
        caplog.at_level(logging.ERROR, "weft.serving"),
    ):
        response = client.post("/v1/tasks/b/predict", json=body)
        refusal(response, 503, "task_unavailable")
        assert "retry-after" in response.headers
        assert "own.safetensors" in caplog.text, "the log says what is wrong"
        message = refusal(client.post("/v1/tasks/c/predict", json=body), 503, "task_unavailable")
        assert "bytes" in message
        found = client.post("/v1/tasks/a/predict", json=body).json()["answers"][0]
        assert close(found["output"], model(x, task="a")[0])


class Embedding(nn.Module):
    """A base that reads whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x)


def test_inputs_that_only_the_base_can_refuse_are_422(tmp_path: Path) -> None:
    base = Embedding().eval()
    model = weft.MultiTaskModel(base, weft.linear_probe(base), example=torch.zeros(1, 5).long())
    model.add_task("words", weft.Classification(3))
    disturb(model)
    bank = Bank(tmp_path)
    bank.save(model)
    model.eval()
    x = torch.tensor([[1, 2, 3, 4, 5]])
    spec = InputSpec(dtype="int64")
    with client_of(Server(bank, base), inputs=spec) as client:
        path = "/v1/tasks/words/predict"
        found = client.post(path, json={"inputs": x.tolist()}).json()["answers"][0]
        assert close(found["output"], model(x, task="words")[0])
        for inputs in ([[99]], [[-1]], [[1.5]], [[[[[1]]]]]):
            refusal(client.post(path, json={"inputs": inputs}), 422, "invalid_input")
        assert client.post(path, json={"inputs": x.tolist()}).status_code == 200
        refusal(
            client.post(path, content=png(), headers={"content-type": "image/png"}),
            415,
            "unsupported_media_type",
        )
    with client_of(Server(bank, base), inputs=InputSpec()) as client:
        refusal(client.post(path, json={"inputs": [[0.5, 1.5]]}), 422, "invalid_input")


# ---------------------------------------------------------------------------------------- token


def test_with_a_token_nothing_is_said_without_it(tmp_path: Path) -> None:
    made = World(tmp_path, token="a-long-secret")
    body = {"inputs": images(1).tolist()}
    with made.client as client:
        for given in (None, "Bearer", "Bearer wrong", "Basic a-long-secret", "Bearer a-long-secre",
                      "Bearer a-long-secrett", "bearer a-long-secret", "Bearer é"):  # fmt: skip
            headers = {} if given is None else {"authorization": given.encode()}
            for method, path in (
                ("GET", "/v1/tasks"), ("GET", "/metrics"), ("POST", "/v1/tasks/a/predict"),
                ("GET", "/v1/unknown"), ("POST", "/v1/refresh"),
            ):  # fmt: skip
                response = client.request(method, path, headers=headers, json=body)
                refusal(response, 401, "unauthorized")
                assert response.headers["www-authenticate"] == "Bearer"
        right = {"authorization": "Bearer a-long-secret"}
        assert client.get("/v1/tasks", headers=right).status_code == 200
        assert client.post("/v1/tasks/a/predict", headers=right, json=body).status_code == 200
        for path in ("/", "/healthz", "/readyz", "/openapi.json"):
            response = client.get(path)
            assert response.status_code == 200
            assert "a-long-secret" not in response.text


def test_responses_are_safe_in_a_browser(world: World) -> None:
    page = world.client.get("/")
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    for path in ("/", "/v1/tasks", "/v1/tasks/nope", "/healthz"):
        headers = world.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "content-security-policy" in headers
        assert "access-control-allow-origin" not in headers
