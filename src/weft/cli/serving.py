"""``weft serve``: the tasks of a bank over HTTP."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console

from weft.bank import Bank
from weft.bases import load_base
from weft.data import Preprocessing
from weft.errors import BankError, ConfigError
from weft.serving import Server
from weft.serving.inputs import InputSpec, Limits

from .output import BankPath, out, plain

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
LOCAL = ("127.0.0.1", "localhost", "::1")


def size_in_bytes(text: str) -> int:
    """A size as people write it: ``256MB``, ``1.5 GiB``, ``4096``.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise ConfigError(f"A size is a number with {', '.join(UNITS)}; found '{text}'.")
    size = int(float(found[1]) * UNITS[found[2].upper()])
    if size < 1:
        raise ConfigError(f"A size is at least one byte, found '{text}'.")
    return size


def numbers(option: str, text: str | None, kind: type[Any]) -> tuple[Any, ...] | None:
    """Numbers with commas between them.

    Raises:
        ConfigError: it is something else.
    """
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"{option} takes numbers with commas between them, found '{text}'."
        ) from None


def serve(
    bank: BankPath,
    base: Annotated[
        str,
        typer.Option(help="timm:NAME, torchvision:NAME, hf:NAME or python:FILE.py:FUNCTION."),
    ],
    weights: Annotated[
        Path | None, typer.Option(help="A file of weights for the base; default pretrained ones.")
    ] = None,
    base_option: Annotated[
        list[str] | None,
        typer.Option(help="An argument of the function that makes the base.", metavar="KEY=VALUE"),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="What heads read if the base returns a structure.")
    ] = None,
    input_shape: Annotated[
        str | None, typer.Option(help="Of one row, for instance 3,224,224.")
    ] = None,
    input_type: Annotated[str, typer.Option(help="float32 or int64.")] = "float32",
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Side to cut and resize images to; default as in training."),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Of each channel in 0..1; default as in training.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Memory for what tasks own, for instance 256MB.")
    ] = None,
    pin: Annotated[list[str] | None, typer.Option(help="Tasks that never leave memory.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Hold own tensors in float16.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="WEFT_TOKEN", show_envvar=True, help="Ask for Authorization: Bearer TOKEN."
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Rows in a batch and in a request.")] = 32,
    max_delay_ms: Annotated[
        float, typer.Option(min=0, help="Time that a request waits for others.")
    ] = 5.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 256,
    max_body: Annotated[str, typer.Option(help="Greatest body.")] = "10MB",
    body_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds in which a body must arrive.")
    ] = 30.0,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Greatest image, width times height.")
    ] = 25_000_000,
    one_task_at_a_time: Annotated[
        bool, typer.Option("--one-task-at-a-time", help="Never mix tasks in a batch.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that a forward uses.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run, for instance cuda.")] = None,
) -> None:
    """Serve the tasks of a bank over HTTP, with a page to try them."""
    from weft.serving.http import create_app
    from weft.serving.process import listen, run
    from weft.serving.service import Settings

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("weft.serving").setLevel(logging.INFO)
    if threads is not None:
        torch.set_num_threads(threads)
    limits = Limits(size_in_bytes(max_body), max_pixels, body_seconds=body_timeout)
    cap = None if max_bytes is None else size_in_bytes(max_bytes)
    if token is not None and not token.strip():
        raise ConfigError("The token is empty. Leave it out, or give a long random one.")
    stored = Bank(bank, create=False)
    facts = _trained_with(stored)
    torch.manual_seed(facts.get("seed") or 0)  # as a base that is drawn at random was in training
    network, stated = load_base(base, weights=weights, options=_options(base_option))
    scale = numbers("--mean", mean, float), numbers("--std", std, float)
    preprocessing = _preprocessing(facts, stated, *scale)
    side = image_size or (facts.get("data") or {}).get("image_size")
    shape = numbers("--input-shape", input_shape, int)
    if shape is None and side is not None:
        shape = (3, side, side)
    spec = InputSpec(
        shape=shape,
        dtype=input_type,
        image_size=side,
        preprocessing=preprocessing if shape is None or len(shape) == 3 else None,
    )
    server = Server(
        stored,
        network.eval(),
        max_bytes=cap,
        pinned=tuple(pin or ()),
        half=half,
        example=None if shape is None else torch.zeros(1, *shape, dtype=getattr(torch, input_type)),
        output=output,
        device=device,
    )
    settings = Settings(
        inputs=spec,
        limits=limits,
        max_batch=max_batch,
        max_delay=max_delay_ms,
        max_queue=max_queue,
        mixed=not one_task_at_a_time,
        token=token,
    )
    if host not in LOCAL and token is None:
        Console(stderr=True).print(
            f"[yellow]warning:[/yellow] {plain(host)} can be reached by others, and there is no "
            "token: anybody who reaches it can use it. Set WEFT_TOKEN.",
            highlight=False,
        )
    listener = listen(host, port)
    at = f"[{host}]" if ":" in host else host
    address = f"http://{at}:{listener.getsockname()[1]}/"
    out.print(
        f"Serving {len(server.task_names)} tasks at {plain(address)} (Ctrl+C ends it)",
        highlight=False,
        soft_wrap=True,
    )
    out.file.flush()
    run(create_app(server, settings), listener)


def _trained_with(bank: Bank) -> dict[str, Any]:
    """What the experiment of the first tasks says of base and data; empty if they had none."""
    for name in bank.tasks()[:10]:
        with suppress(BankError):  # a damaged task is no reason not to serve the others
            facts = bank.info(name)["facts"].get("experiment")
            if isinstance(facts, dict):
                return facts
    return {}


def _options(given: list[str] | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--base-option is KEY=VALUE, found '{text}'.")
        options[key] = yaml.safe_load(value)
    return options


def _preprocessing(
    facts: dict[str, Any],
    stated: Preprocessing | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> Preprocessing:
    """How pixels are scaled: as asked for, else as in training, else as the base's library says."""
    section = facts.get("base") or {}
    mean, std = mean or section.get("mean"), std or section.get("std")
    if mean or std:
        return Preprocessing(mean=tuple(mean or (0.5,)), std=tuple(std or (0.5,)))
    return stated or Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)
