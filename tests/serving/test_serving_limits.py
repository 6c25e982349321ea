"""What requests may cost: images, answers, what waits; and what strangers may ask for."""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import weft
from serving.banks import SHAPE, images, make_bank, make_base
from weft.bank import Bank
from weft.data import Preprocessing
from weft.data.images import decode_one
from weft.errors import DataError
from weft.serving import Server
from weft.serving.inputs import InputSpec, Limits
from weft.serving.settings import Settings

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from weft.serving.http import create_app
from weft.serving.responses import Json

PIXELS = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
SPEC = InputSpec(shape=SHAPE, image_size=6, preprocessing=PIXELS)
ROW = images(1).tolist()
PATH = "/v1/tasks/a/predict"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    bank, _ = make_bank(tmp_path_factory.mktemp("limits"))
    return Server(bank, make_base())


def client_of(server: Server, **settings: Any) -> TestClient:
    settings = {"inputs": SPEC, "max_batch": 8, "max_delay": 1.0, **settings}
    return TestClient(create_app(server, Settings(**settings)), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[TestClient]:
    with client_of(server) as made:
        yield made


def refusal(response: Any, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == code
    return str(response.json()["error"]["message"])


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def sent(client: TestClient, *files: bytes, path: str = PATH, **data: Any) -> Any:
    return client.post(path, files=[("image", ("x", data)) for data in files], data=data)


# --------------------------------------------------------------------------------------- images


def test_images_are_taken_only_where_their_size_is_known(server: Server) -> None:
    image = encoded(Image.new("RGB", (6, 6)))
    with client_of(server, inputs=InputSpec(preprocessing=PIXELS)) as client:
        assert client.get("/v1/info").json()["image_types"] == []
        for response in (
            sent(client, image),
            client.post(PATH, content=image, headers={"content-type": "image/png"}),
        ):
            assert "--image-size" in refusal(response, 415, "unsupported_media_type")
        described = client.get("/openapi.json").json()["paths"]["/v1/predict_all"]["post"]
        assert list(described["requestBody"]["content"]) == ["application/json"]
        assert client.post(PATH, json={"inputs": ROW}).status_code == 200


def test_images_without_a_side_have_the_shape_of_a_row(server: Server) -> None:
    kept = InputSpec(shape=SHAPE, preprocessing=PIXELS)
    with client_of(server, inputs=kept) as client:
        assert sent(client, encoded(Image.new("RGB", (6, 6)))).status_code == 200
        message = refusal(sent(client, encoded(Image.new("RGB", (700, 6)))), 422, "invalid_input")
        assert "700 x 6 pixels; expected 6 x 6" in message


def test_pixels_of_all_images_of_a_request_are_bounded(server: Server) -> None:
    image = encoded(Image.new("L", (100, 100)))
    with client_of(server, limits=Limits(pixels=10_000)) as client:
        assert sent(client, *[image] * 4).status_code == 200
        message = refusal(sent(client, *[image] * 5), 413, "too_large")
        assert "50,000 pixels; up to 40,000" in message


def test_frames_that_are_larger_than_their_file_says_are_refused(server: Server) -> None:
    file = bytearray(encoded(Image.new("P", (300, 300)), "GIF"))
    file[6:10] = struct.pack("<HH", 10, 10)
    with client_of(server, limits=Limits(pixels=10_000)) as client:
        refusal(sent(client, bytes(file)), 413, "too_large")


@pytest.mark.parametrize("format", ["PNG", "PPM"])
def test_greys_of_16_bits_are_scaled(format: str, client: TestClient) -> None:
    wide = np.linspace(0, 65535, 36).reshape(6, 6)
    file = encoded(Image.fromarray(wide.astype(np.uint16)), format)
    expected = np.round(wide.astype(np.uint16) / 257).astype(np.uint8)
    assert np.array_equal(decode_one(file, None), np.repeat(expected[:, :, None], 3, 2))
    if format == "PNG":
        found = sent(client, file).json()["answers"]
        assert found == sent(client, encoded(Image.fromarray(expected))).json()["answers"]


def test_pixels_of_32_bits_are_refused_by_name() -> None:
    for kind, mode in ((np.int32, "I"), (np.float32, "F")):
        file = encoded(Image.fromarray(np.ones((4, 4), kind)), "TIFF")
        with pytest.raises(DataError, match=rf"32 bits \(mode {mode}\)"):
            decode_one(file, 4)


# -------------------------------------------------------------------------------------- answers


def test_answers_hold_ten_classes_unless_more_are_asked_for(tmp_path: Path) -> None:
    base = make_base()
    model = weft.MultiTaskModel(base, weft.linear_probe(base), example=images(1))
    model.add_task("a", weft.Classification(25))
    bank = Bank(tmp_path)
    bank.save(model)
    with client_of(Server(bank, base)) as client:
        for query, count in (("", 10), ("?top=3", 3), ("?top=100", 25)):
            answer = client.post(PATH + query, json={"inputs": ROW}).json()["answers"][0]
            assert (len(answer["classes"]), len(answer["output"])) == (count, 25)
        operations = client.get("/openapi.json").json()["paths"]
        for path in ("/v1/predict", "/v1/predict_all", "/v1/tasks/{task}/predict"):
            [top] = [p for p in operations[path]["post"]["parameters"] if p["name"] == "top"]
            assert top["schema"]["default"] == 10


def test_rows_times_tasks_are_bounded(server: Server) -> None:
    with client_of(server, max_answers=8) as client:
        assert client.get("/v1/info").json()["max_answers"] == 8
        body = {"inputs": images(2).tolist()}
        assert client.post("/v1/predict_all", json=body).status_code == 200
        body = {"inputs": images(3).tolist()}
        message = refusal(client.post("/v1/predict_all", json=body), 422, "invalid_input")
        assert "3 rows and 4 tasks are 12 answers; up to 8" in message
        body["tasks"] = ["a", "b", "a"]
        assert client.post("/v1/predict_all", json=body).status_code == 200


def test_a_refusal_for_a_full_queue_gives_one_piece_of_advice(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client_of(server, max_queue_bytes=1000) as client:
        batcher = client.app.state.service.batcher
        assert batcher.max_queue_bytes == 1000
        for name, value, words in (
            ("_waiting", 10**6, "1000000 requests are waiting"),
            ("_bytes", 5000, "5,000 bytes of inputs are waiting"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(batcher, "_waiting", 1)
                patch.setattr(batcher, name, value)
                message = refusal(client.post(PATH, json={"inputs": ROW}), 503, "overloaded")
            assert words in message
            assert message.count("Try again later.") == 1


# ---------------------------------------------------------------------------------------- names


HALF = "\\ud800"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (PATH, f'{{"inputs": [1], "{HALF}": 1}}', 422),
        ("/v1/predict", f'{{"inputs": {ROW}, "tasks": ["{HALF}"]}}', 404),
        ("/v1/predict_all", f'{{"inputs": {ROW}, "tasks": ["a", "{HALF}"]}}', 404),
    ],
)
def test_half_characters_are_refused_like_others(
    path: str, body: str, status: int, client: TestClient
) -> None:
    response = client.post(path, content=body, headers=JSON)
    assert response.status_code == status
    assert "?" in response.json()["error"]["message"]


@pytest.mark.parametrize("codec", ["raw_unicode_escape", "utf-7", "hex", "idna", "punycode", "x\0"])
def test_forms_are_read_in_one_way_whatever_codec_they_name(codec: str, client: TestClient) -> None:
    image = encoded(Image.new("RGB", (6, 6)))
    parts = b'--XX\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + image
    parts += (
        b'\r\n--XX\r\nContent-Disposition: form-data; name="tasks"\r\n\r\n\\ud800\r\n--XX--\r\n'
    )
    headers = {"content-type": f'multipart/form-data; charset="{codec}"; boundary=XX'}
    response = client.post("/v1/predict_all", content=parts, headers=headers)
    assert "no task '\\ud800'" in refusal(response, 404, "unknown_task")


def test_whatever_an_answer_names_can_be_written() -> None:
    assert Json({"name": "d\ud800g", "é": "\0"}).body == '{"name":"d?g","é":"\\u0000"}'.encode()


def test_a_file_in_the_place_of_a_name_is_refused(client: TestClient) -> None:
    files = [("image", ("x", encoded(Image.new("RGB", (6, 6))))), ("tasks", ("t", b"a"))]
    response = client.post("/v1/predict_all", files=files)
    assert "'tasks'" in refusal(response, 422, "invalid_input")


def test_the_task_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    bank, _ = make_bank(tmp_path)
    (bank.path / "tasks" / "b" / "own.safetensors").write_bytes(b"")
    (bank.path / "tasks" / "c" / "bundle.json").write_text("{}")
    with client_of(Server(bank, make_base())) as client:
        for names in (["a", "b"], ["a", "c"]):
            body = {"inputs": ROW * 2, "tasks": names}
            for path in ("/v1/predict", "/v1/predict_all"):
                message = refusal(client.post(path, json=body), 503, "task_unavailable")
                assert message == f"The task '{names[1]}' cannot be loaded at present."


# ------------------------------------------------------------------------------- failures, hosts


def test_failures_protect_a_browser_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, _ = make_bank(tmp_path)
    server = Server(bank, make_base())

    def fails(*_: Any) -> Any:
        raise RuntimeError("secret path")

    monkeypatch.setitem(server.__dict__, "answers", fails)
    with client_of(server) as client:
        response = client.post(PATH, json={"inputs": ROW})
        assert "secret" not in refusal(response, 500, "internal")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["content-security-policy"].startswith("default-src 'none'")
        text = client.get("/metrics").text
        assert re.search(r'weft_errors_total\{code="internal"\} 1\.0', text)
        assert 'endpoint="/v1/tasks/{task}/predict",status="500"' in text


def test_a_server_that_runs_nothing_any_more_is_not_ready(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client_of(server) as client:
        assert client.get("/readyz").status_code == 200
        batcher = client.app.state.service.batcher
        with monkeypatch.context() as patch:
            patch.setattr(type(batcher), "failed", True)
            refusal(client.get("/readyz"), 503, "failed")
            refusal(client.post(PATH, json={"inputs": ROW}), 503, "failed")
            assert client.get("/healthz").status_code == 200


def test_a_name_that_is_not_the_servers_is_refused(server: Server) -> None:
    hosts = ("127.0.0.1", "localhost", "::1")
    with client_of(server, hosts=hosts) as client:
        for host in ("127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000"):
            assert client.get("/v1/tasks", headers={"host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example:8000", "127.0.0.1.nip.io", "[", ""):
            for path in ("/", "/v1/tasks"):
                response = client.get(path, headers={"host": host})
                assert "--allow-host" in refusal(response, 403, "forbidden")


def test_pages_of_other_sites_cannot_refresh(client: TestClient) -> None:
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site", "origin": "http://testserver"},
        {"sec-fetch-site": "same-site"},
    ):
        refusal(client.post("/v1/refresh", headers=headers), 403, "forbidden")
    for headers in (
        {},
        {"origin": "http://testserver"},
        {"sec-fetch-site": "same-origin", "origin": "https://behind.a.proxy"},
    ):
        assert client.post("/v1/refresh", headers=headers).status_code == 200


def test_a_vanished_bank_is_not_a_refresh(tmp_path: Path) -> None:
    bank, _ = make_bank(tmp_path)
    with client_of(Server(bank, make_base())) as client:
        bank.path.rename(tmp_path / "elsewhere")
        refusal(client.post("/v1/refresh"), 503, "task_unavailable")
        assert client.get("/v1/tasks").json()["total"] == 4


def test_heads_of_what_is_looked_at_most(client: TestClient) -> None:
    for path in ("/", "/healthz", "/readyz"):
        assert client.head(path).status_code == 200
    assert json.loads(client.get("/openapi.json").text)["paths"]["/"].keys() == {"get"}


def test_shapes_that_no_row_has_are_refused() -> None:
    for shape in ((3, -1, 2), (0,), (3, 9_999_999, 9_999_999)):
        with pytest.raises(DataError, match="A row has the shape"):
            InputSpec(shape=shape)
    assert InputSpec(shape=()).shape == ()
    assert torch.zeros(1, *SHAPE).shape == (1, *SHAPE)
