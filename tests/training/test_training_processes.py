"""Law 10: two processes that train several tasks agree with one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training_nets import assert_close, assert_same_bits, dense_net, everything, model_of, vectors
from two_processes import (
    BATCH_NORM,
    PLANS,
    REVIEWED,
    normalised_data,
    normalised_model,
    run_dense,
)

import weft
from weft.errors import ConfigError

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Where the processes wrote, and what each computed."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "PATH": "",
        "PYTHONPATH": str(Path(weft.__file__).parents[1]),
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)],
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(outputs)
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in "01"]
    return folder, results


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", PLANS)
def test_gradients_parameters_and_history_agree_with_one_process(
    two: tuple[Path, list[dict[str, Any]]], name: str, accumulate: int
) -> None:
    first, second = (result[f"dense {name} {accumulate}"] for result in two[1])
    assert_same_bits(first["tensors"], second["tensors"])
    assert first["rows"] == second["rows"]
    alone = run_dense(name, accumulate)
    assert_close(first["tensors"], alone["tensors"], 1e-9)
    assert len(first["gradients"]) == len(alone["gradients"])
    for mine, others in zip(first["gradients"], alone["gradients"], strict=True):
        assert [g is None for g in mine] == [g is None for g in others]
        for gradient, other in zip(mine, others, strict=True):
            if gradient is not None:
                torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-10)
    for task, rows in alone["rows"].items():
        for row, other in zip(first["rows"][task], rows, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
            assert row["penalty"] == pytest.approx(other["penalty"], rel=1e-6)
            assert row["val"] == pytest.approx(other["val"], rel=1e-6)


def _by_hand(name: str, accumulate: int) -> tuple[dict[str, Tensor], list[float]]:
    """One process that does what two do: each half of a batch is normalised by itself."""
    model = normalised_model(name)
    parameters = [p for t in "ab" for p in model.task_parameters(t)]
    parameters += model.shared_trainable().values()
    optimizer = torch.optim.SGD(parameters, 0.05, 0.9)
    means = []
    model.train()
    for _ in range(2):
        losses = []
        for index in range(6):
            rows = slice(8 * index, 8 * index + 8)
            batch = {t: [v[rows] for v in d.tensors] for t, d in normalised_data().items()}
            start = {n: b.clone() for n, b in model.named_buffers()}
            ends: list[dict[str, Tensor]] = []
            for half in (slice(0, 4), slice(4, 8)):
                for n, buffer in model.named_buffers():
                    buffer.copy_(start[n])
                step = model.step({t: x[half] for t, (x, _) in batch.items()})
                each = [
                    nn.functional.cross_entropy(step.outputs[t], batch[t][1][half]) for t in "ab"
                ]
                ((sum(each) + step.penalty) / 2 / accumulate).backward()
                losses.append(float(each[1].detach()))
                ends.append({n: b.clone() for n, b in model.named_buffers()})
            for n, buffer in model.named_buffers():
                if buffer.is_floating_point():
                    buffer.copy_((ends[0][n] + ends[1][n]) / 2)
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        means.append(sum(losses) / len(losses))
    for task in "ab":
        model.harden(task)
    return everything(model), means


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", BATCH_NORM)
def test_statistics_are_the_mean_over_processes(
    two: tuple[Path, list[dict[str, Any]]], name: str, accumulate: int
) -> None:
    first, second = (result[f"normalised {name} {accumulate}"] for result in two[1])
    assert_same_bits(first["tensors"], second["tensors"])
    tensors, losses = _by_hand(name, accumulate)
    assert_close(first["tensors"], tensors, 1e-9)
    assert first["losses"] == pytest.approx(losses, rel=1e-6)


def test_a_loss_that_is_not_finite_stops_all_processes(
    two: tuple[Path, list[dict[str, Any]]],
) -> None:
    first, second = (result["failing"] for result in two[1])
    assert first == "True The loss of another process at step 0 is not finite."
    assert second.startswith("True The inputs of 'a' at step 0 contain NaN")


def test_all_processes_stop_with_one(two: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [result["stopping"] for result in two[1]] == [2, 2]


def test_all_processes_keep_the_same_epoch_of_a_model_that_draws(
    two: tuple[Path, list[dict[str, Any]]],
) -> None:
    """And each process's metrics are of all rows, once."""
    first, second = (result["drawing"] for result in two[1])
    assert first["val"] == second["val"]
    assert first["best"] == second["best"]
    assert_same_bits(first["tensors"], second["tensors"])
    assert [values["rows"] for values in first["val"]] == [40] * 8
    assert len({values["accuracy"] for values in first["val"]}) > 2


@pytest.mark.parametrize("name", REVIEWED)
def test_what_reviews_change_is_the_same_in_all_processes(
    two: tuple[Path, list[dict[str, Any]]], name: str
) -> None:
    first, second = (result[name] for result in two[1])
    assert_same_bits(first, second)
    assert all(bool(t.isfinite().all()) for t in first.values())


def test_processes_that_would_each_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    base = dense_net()
    model = model_of(base, weft.full_finetune(base), tasks=["a"])
    with pytest.raises(ConfigError, match="Set ACCELERATE_USE_CPU=true"):
        weft.fit(model, {"a": DataLoader(vectors(16, 3, 1), 8)}, epochs=1, progress=False)


def test_data_that_cannot_be_divided_is_refused(two: tuple[Path, list[dict[str, Any]]]) -> None:
    for result in two[1]:
        assert len(result["refused"]) == 2
        assert "multiple of 2, found DataLoader with batch_size=5" in result["refused"][0]
        assert "multiple of 2, found list" in result["refused"][1]


def test_files_are_written_once_and_runs_go_on(two: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = two
    assert_same_bits(first["files"], second["files"])
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in rows] == list(range(6))
    base = dense_net()
    model = model_of(base, weft.taps(base, warmup=1, harden=0.4))
    loader = DataLoader(vectors(32, 3, 1), 8, shuffle=True)
    weft.fit(model, {"a": (loader, loader)}, epochs=6, progress=False)
    assert_close(first["files"], everything(model), 1e-4)
