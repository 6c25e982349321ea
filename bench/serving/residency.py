"""Many tasks on one base: selecting one, loading the i-th, what they hold in memory, and a server
over a bank of many tasks with a bound on that memory.

Run with: python bench/serving/residency.py   (the bank of 1,000 tasks takes 1.2 GB in a temporary
folder; --tasks makes it smaller)
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import weft
from resnet import ResNet34
from timing import machine, milliseconds
from weft.bank.documents import render
from weft.serving import Server

DIFFERENT = 20
"""Tasks of the large bank that differ; the others are copies of them under other names."""


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


def calling(tasks: int) -> None:
    """Seconds of a whole call of a server on a base that costs nothing, many tasks in memory."""
    base, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(1, 8)
    with tempfile.TemporaryDirectory() as folder:
        bank = weft.Bank(Path(folder) / "bank")
        model = weft.MultiTaskModel(base, weft.scale_bias(base), example=x)
        for i in range(tasks):
            model.add_task(f"task {i}", weft.Classification(10))
        bank.save(model)
        model.eval()
        server = Server(bank, base)
        names = list(server.task_names)
        server.preload(*names)
        ours, plain = [], []
        with torch.inference_mode():
            for name in random.Random(0).choices(names, k=300):
                start = time.perf_counter()
                server(x, task=name)
                ours.append(time.perf_counter() - start)
                start = time.perf_counter()
                model(x, task=name)
                plain.append(time.perf_counter() - start)
    print(
        f"a whole call, {tasks} in memory, nearly no base: server {milliseconds(ours)}, "
        f"model {milliseconds(plain)}"
    )


def copy_task(bank: weft.Bank, task: str, name: str) -> None:
    """A bundle under another name: saving 1,000 tasks one by one would take most of the time."""
    place = bank.path / "tasks" / name
    shutil.copytree(bank.path / "tasks" / task, place)
    stored = {"format", "version", "checksum"}
    entry = {k: v for k, v in bank.info(task).items() if k not in stored}
    (place / "bundle.json").write_bytes(render("bundle", {**entry, "task": name}))


def serving(base: nn.Module, tasks: int, cap: int) -> None:
    """Opening a bank of many tasks, and serving each of them in random order within a bound."""
    x = torch.randn(1, 3, 32, 32)
    with tempfile.TemporaryDirectory() as folder:
        bank = weft.Bank(Path(folder) / "bank")
        model = weft.MultiTaskModel(base, weft.scale_bias(base), example=x)
        for i in range(DIFFERENT):
            model.add_task(f"task {i}", weft.Classification(500))
        with torch.no_grad():
            for name in model.task_names:
                for tensor in model.task_parameters(name):
                    tensor += 0.01 * torch.randn_like(tensor)
            bank.save(model)
            model.eval()
            expected = {name: model(x, task=name) for name in model.task_names}
        for i in range(DIFFERENT, tasks):
            copy_task(bank, f"task {i % DIFFERENT}", f"task {i}")
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            server = Server(weft.Bank(bank.path), base, max_bytes=cap)
            seconds.append(time.perf_counter() - start)
        print(
            f"open a bank of {len(server.task_names)} tasks, base hashed: {milliseconds(seconds)}"
        )
        names = list(server.task_names)
        server(x, task=names[0])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        most, first, wrong = 0, [], 0
        for name in random.Random(0).sample(names, len(names)):
            start = time.perf_counter()
            found = server(x, task=name)
            first.append(time.perf_counter() - start)
            most = max(most, server.resident_bytes)
            same = expected[f"task {int(name.split()[1]) % DIFFERENT}"]
            wrong += not torch.equal(found, same)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        again = []
        for name in random.Random(1).choices(list(server.resident), k=100):
            start = time.perf_counter()
            server(x, task=name)
            again.append(time.perf_counter() - start)
        print(
            f"every task once, in random order, max_bytes {cap / 1e6:.0f} MB: at most "
            f"{most / 1e6:.1f} MB of own tensors and heads, {server.evictions} tasks left, peak of "
            f"the process {grown / 1e3:.0f} MB higher; {len(names)} outputs compared bit by bit, "
            f"{wrong} wrong; load and run {milliseconds(first)}, run {milliseconds(again)}"
        )


def main() -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--cap", type=int, default=256_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-server", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(machine())
    base = ResNet34().eval()
    if not given.only_server:
        selecting(base, 500)
        calling(500)
        loading(base, 50)
        memory(base, 50)
    serving(base, given.tasks, given.cap)


if __name__ == "__main__":
    main()
