"""Requests for 20 tasks from 64 clients at once, tasks mixed in batches against one at a time.

Two servers run the same bank, one in each way. They take turns, so that noise of the machine hits
both. Every answer is compared with what the task says in eager PyTorch.

Run with: python bench/serving/http_load.py
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import weft
from resnet import ResNet34
from timing import machine, ratio
from weft.data import Preprocessing
from weft.data.images import decode_one
from weft.patches import GatedTuned

TASKS, IMAGES, SIDE = 20, 64, 32
BENCH = Path(__file__).parent.parent
WAYS = {"mixed": (), "one task at a time": ("--one-task-at-a-time",)}


def make_bank(folder: Path) -> tuple[weft.Bank, weft.MultiTaskModel]:
    """Tasks of which half own normalisation and half, by TAPS, a few layers; heads differ."""
    torch.manual_seed(0)
    base = ResNet34().eval()
    example = torch.zeros(1, 3, SIDE, SIDE)
    model = weft.MultiTaskModel(base, weft.taps(base), example=example)
    draw = random.Random(0)
    for i in range(TASKS):
        name, plan = f"task {i:02d}", weft.scale_bias(base) if i % 2 else model.sharing
        model.add_task(name, weft.Classification(10 + i), sharing=plan)
        with torch.no_grad():
            for key, tensor in model.trainable(name).items():
                if key in {patch.score for patch in _gated(model, name)}:
                    tensor.fill_(0.2 if draw.random() < 0.12 else 0.0)
                else:
                    tensor += 0.02 * torch.randn_like(tensor)
    bank = weft.Bank(folder / "bank")
    bank.save(model)
    return bank, bank.load(base).eval()


def _gated(model: weft.MultiTaskModel, name: str) -> list[GatedTuned]:
    patches = model.plan(name).patches.values()
    return [p for p in patches if isinstance(p, GatedTuned)]


def make_images() -> list[bytes]:
    """Encoded pictures of noise."""
    draw, found = np.random.default_rng(0), []
    for _ in range(IMAGES):
        file = io.BytesIO()
        pixels = draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        found.append(file.getvalue())
    return found


def eager(model: weft.MultiTaskModel, images: list[bytes]) -> dict[str, Tensor]:
    """By task, what it says about each image."""
    pixels = np.stack([decode_one(image, SIDE) for image in images])
    x = Preprocessing.imagenet()(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    with torch.no_grad():
        return {name: model(x, task=name) for name in model.task_names}


@dataclass
class Tally:
    """What became of requests."""

    latencies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    wrong: int = 0


async def client(
    port: int,
    work: list[tuple[str, int]],
    images: list[bytes],
    expected: dict[str, Tensor],
    tally: Tally,
) -> None:
    """One connection that takes from the work until there is none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while work:
        task, image = work.pop()
        body = images[image]
        path = f"/v1/tasks/{task.replace(' ', '%20')}/predict?top=1"
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        start = time.perf_counter()
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        size = re.search(rb"content-length: (\d+)", answer)
        assert size is not None
        content = json.loads(await reader.readexactly(int(size[1])))
        tally.latencies.append(time.perf_counter() - start)
        if not answer.startswith(b"HTTP/1.1 200"):
            tally.refused += 1
            continue
        found = content["answers"][0]
        right = expected[task][image]
        close = torch.allclose(torch.tensor(found["output"]), right, rtol=1e-4, atol=1e-4)
        tally.wrong += found["task"] != task or not close
    writer.close()


async def rounds(
    ports: dict[str, int],
    images: list[bytes],
    expected: dict[str, Tensor],
    given: argparse.Namespace,
) -> dict[str, Tally]:
    """Both servers in turns, the same requests for both."""
    tallies = {way: Tally() for way in ports}
    draw = random.Random(1)
    for turn in range(-1, given.rounds):
        count = given.requests // given.rounds if turn >= 0 else 10 * TASKS
        work = [(draw.choice(list(expected)), draw.randrange(IMAGES)) for _ in range(count)]
        for way in list(ports)[:: 1 if turn % 2 else -1]:
            tally = tallies[way] if turn >= 0 else Tally()  # the first round loads the tasks
            todo = list(work)
            start = time.perf_counter()
            clients = (
                client(ports[way], todo, images, expected, tally) for _ in range(given.clients)
            )
            await asyncio.gather(*clients)
            tally.seconds.append(time.perf_counter() - start)
    return tallies


def start_server(bank: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
    """A server process and its port."""
    command = [sys.executable, "-u", "-m", "weft", "serve", str(bank), "--port", "0"]
    base = ("--base", f"python:{BENCH / 'resnet.py'}:ResNet34", "--image-size", str(SIDE))
    pixels = ("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
    process = subprocess.Popen(
        [*command, *base, *pixels, *options], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    found = re.search(r":(\d+)/", process.stdout.readline())
    assert found is not None, "the server did not start"
    return process, int(found[1])


def show(way: str, tally: Tally) -> None:
    """One line."""
    cuts = statistics.quantiles(tally.latencies, n=100)
    p50, p95, p99 = (1000 * cuts[i] for i in (49, 94, 98))
    print(
        f"{way}: {len(tally.latencies)} requests, {tally.wrong} wrong, {tally.refused} refused; "
        f"{len(tally.latencies) / sum(tally.seconds):.0f} requests/s; "
        f"p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms"
    )


def main() -> None:
    """Print a line per way, and how they compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="to each server")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of each server's forwards")
    parser.add_argument("--max-delay-ms", type=float, default=5.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        bank, model = make_bank(Path(folder))
        images = make_images()
        expected = eager(model, images)
        common = ("--threads", str(given.threads), "--max-delay-ms", str(given.max_delay_ms))
        servers = {w: start_server(bank.path, *common, *options) for w, options in WAYS.items()}
        try:
            ports = {way: port for way, (_, port) in servers.items()}
            tallies = asyncio.run(rounds(ports, images, expected, given))
        finally:
            for process, _ in servers.values():
                process.terminate()
                process.wait(60)
    owned = [model.ledger(name).own_fraction for name in model.task_names]
    print(f"{TASKS} tasks own {100 * min(owned):.1f} to {100 * max(owned):.1f} % of a ResNet-34")
    for way, tally in tallies.items():
        show(way, tally)
    seconds = {way: tally.seconds for way, tally in tallies.items()}
    print(f"one task at a time / mixed, seconds: {ratio(seconds, 'one task at a time', 'mixed')}")


if __name__ == "__main__":
    main()
