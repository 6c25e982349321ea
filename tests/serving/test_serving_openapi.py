"""The OpenAPI description is true: what schemathesis makes of it is answered as it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.bank import Bank
from weft.data import Preprocessing
from weft.serving import Server
from weft.serving.inputs import InputSpec, Limits
from weft.serving.settings import Settings

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

from serving.processes import ServerThread  # noqa: E402
from weft.serving.http import create_app  # noqa: E402

SHAPE = (3, 2, 2)


class Tiny(nn.Module):
    """A base whose inputs are so small that they can be described number by number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 3, 2, 2) -> (rows, 4, 2, 2)."""
        return self.conv(x)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    base = Tiny()
    model = weft.MultiTaskModel(base, weft.full_finetune(base), example=torch.zeros(1, *SHAPE))
    for name in ("a", "b"):
        model.add_task(name, weft.Classification(3))
    bank = Bank(tmp_path_factory.mktemp("openapi"))
    bank.save(model)
    pixels = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)
    spec = InputSpec(shape=SHAPE, image_size=2, preprocessing=pixels)
    limits = Limits(body=1_000_000)
    return create_app(Server(bank, base), Settings(spec, limits, max_batch=4, max_delay=0.0))


@pytest.fixture(scope="module")
def operations(app: Any) -> Iterator[dict[str, Any]]:
    """By method and path, the operations of the description."""
    with ServerThread(app) as served:
        schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        found = [result.ok() for result in schema.get_all_operations()]
        yield {operation.label: operation for operation in found}


OPERATIONS = (
    "GET /",
    "GET /healthz",
    "GET /metrics",
    "GET /readyz",
    "GET /v1/info",
    "GET /v1/tasks",
    "GET /v1/tasks/{task}",
    "POST /v1/predict",
    "POST /v1/predict_all",
    "POST /v1/refresh",
    "POST /v1/tasks/{task}/predict",
)

# Bytes that are no image, and names that are no task's, are refused though they are bytes and
# names: a description cannot say which are.
UNPROMISED = [positive_data_acceptance]


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", OPERATIONS)
def test_every_operation_answers_as_described(
    label: str, mode: Any, operations: dict[str, Any]
) -> None:
    assert set(operations) == set(OPERATIONS)
    operation = operations[label]
    if mode.value == "negative" and not (operation.body or operation.query):
        pytest.skip("nothing can be wrong about it")

    @settings(
        max_examples=40 if operation.body else 8,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def answers_as_described(case: Any) -> None:
        response = case.call(timeout=30)
        case.validate_response(response, excluded_checks=UNPROMISED)

    answers_as_described()


def test_sound_requests_of_every_kind_are_accepted(app: Any) -> None:
    from fastapi.testclient import TestClient

    with TestClient(app) as client:
        described = client.get("/openapi.json").json()["paths"]
        row = torch.zeros(SHAPE).tolist()
        bodies = {
            "/v1/tasks/{task}/predict": {"inputs": row},
            "/v1/predict": {"inputs": [row], "tasks": ["a"]},
            "/v1/predict_all": {"inputs": [row, row]},
        }
        for path, operations in described.items():
            for method in operations:
                response = client.request(method, path.format(task="a"), json=bodies.get(path))
                assert response.status_code == 200, (path, response.text)
