"""Many tasks on one base: selecting one, loading the i-th, and what they hold in memory.

Run with: python bench/residency.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import weft
from resnet import ResNet34
from timing import machine, milliseconds


def storages(module: nn.Module) -> dict[int, int]:
    """Bytes of every distinct piece of memory that a module's tensors use."""
    tensors = [*module.parameters(), *module.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def selecting(base: nn.Module, tasks: int) -> None:
    """Seconds to select and bind one of many resident tasks."""
    model = weft.MultiTaskModel(base, weft.scale_bias(base), example=torch.zeros(1, 3, 32, 32))
    for i in range(tasks):
        model.add_task(f"task {i}", weft.Classification(10))
    model.eval()
    seconds = []
    with torch.no_grad():
        for i in range(0, tasks, 5):
            start = time.perf_counter()
            view = model.view(f"task {i}")
            seconds.append(time.perf_counter() - start)
            del view
    print(f"select and bind one of {tasks} tasks: {milliseconds(seconds)}")


def loading(base: nn.Module, tasks: int) -> None:
    """The i-th bundle, hash checked, against a raw read of the same bytes, small and large."""
    for name, plan in {"scale_bias": weft.scale_bias, "full_finetune": weft.full_finetune}.items():
        count = tasks if name == "scale_bias" else 10
        with tempfile.TemporaryDirectory() as folder:
            bank = weft.Bank(Path(folder) / "bank")
            model = weft.MultiTaskModel(base, plan(base), example=torch.zeros(1, 3, 32, 32))
            for i in range(count):
                model.add_task(f"task {i}", weft.Classification(1000))
                bank.save(model, f"task {i}")
                model.remove_task(f"task {i}")
            names = bank.tasks()
            target = bank.load(base, names[0])
            ours, raw, mapped, kept = [], [], [], []
            for task in names[1:]:
                start = time.perf_counter()
                bank.add_to(target, task)
                ours.append(time.perf_counter() - start)
                files = sorted((bank.path / "tasks" / task).rglob("*.safetensors"))
                # Tensors in memory of their own, as a resident task needs them.
                start = time.perf_counter()
                kept.append([t.clone() for file in files for t in load_file(file).values()])
                raw.append(time.perf_counter() - start)
                # Tensors that stay in the mapped file, read once.
                start = time.perf_counter()
                for file in files:
                    for tensor in load_file(file).values():
                        tensor.sum()
                mapped.append(time.perf_counter() - start)
            third = max(1, len(ours) // 3)
            ratios = [a / b for a, b in zip(ours, raw, strict=True)]
            print(
                f"load one of {count} bundles of {name}: first third {milliseconds(ours[:third])}, "
                f"last third {milliseconds(ours[-third:])}; raw read {milliseconds(raw[:third])}, "
                f"{milliseconds(raw[-third:])} (left in the mapped file {milliseconds(mapped)}); "
                f"ratio {statistics.median(ratios):.2f}"
            )


def memory(base: nn.Module, tasks: int) -> None:
    """Bytes of all tensors of a model that has run every task, against base + own + heads."""
    x = torch.randn(2, 3, 32, 32)
    model = weft.MultiTaskModel(base, weft.scale_bias(base), example=x[:1])
    before = sum(storages(base).values())
    for i in range(tasks):
        model.add_task(f"task {i}", weft.Classification(10))
    model.eval()
    with torch.no_grad():
        model.predict_all(x)
    held = sum({**storages(base), **storages(model)}.values())
    ledgers = [model.ledger(name) for name in model.task_names]
    expected = before + sum(led.own_bytes + led.head_bytes for led in ledgers)
    print(f"{tasks} tasks: {held / 1e6:.1f} MB held, base + own + heads {expected / 1e6:.1f} MB")


def main() -> None:
    """Print all three."""
    torch.manual_seed(0)
    print(machine())
    base = ResNet34()
    selecting(base, 500)
    loading(base, 50)
    memory(base, 50)


if __name__ == "__main__":
    main()
