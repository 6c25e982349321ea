"""``weft serve``: the tasks of a bank over HTTP."""

from __future__ import annotations

import logging
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
from weft.errors import BankError, ConfigError, DataError
from weft.serving import Server
from weft.serving.inputs import InputSpec, Limits, check_shape
from weft.sizes import size_in_bytes

from .output import BankPath, out, plain
from .trained import Trained, trained

LOCAL = ("127.0.0.1", "localhost", "::1")


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


def row_shape(text: str | None) -> tuple[int, ...] | None:
    """The shape of one row, as ``--input-shape`` says it.

    Raises:
        ConfigError: it is none.
    """
    shape = numbers("--input-shape", text, int)
    if shape is not None:
        try:
            check_shape(shape)
        except DataError as error:
            raise ConfigError(f"--input-shape: {error}") from None
    return shape


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
    max_queue_bytes: Annotated[str, typer.Option(help="Inputs that may wait.")] = "512MB",
    max_answers: Annotated[
        int, typer.Option(min=1, help="Rows times tasks of one request.")
    ] = 1024,
    max_body: Annotated[str, typer.Option(help="Greatest body.")] = "10MB",
    body_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds in which a body must arrive.")
    ] = 30.0,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Greatest image, width times height.")
    ] = 25_000_000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name that browsers know it by, where a proxy hands that on."),
    ] = None,
    one_task_at_a_time: Annotated[
        bool, typer.Option("--one-task-at-a-time", help="Never mix tasks in a batch.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that a forward uses.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run, for instance cuda.")] = None,
) -> None:
    """Serve the tasks of a bank over HTTP, with a page to try them."""
    from weft.serving.http import create_app
    from weft.serving.process import listen, run
    from weft.serving.settings import Settings

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("weft.serving").setLevel(logging.INFO)
    if threads is not None:
        torch.set_num_threads(threads)
    limits = Limits(size_in_bytes(max_body), max_pixels, body_seconds=body_timeout)
    cap = None if max_bytes is None else size_in_bytes(max_bytes)
    token = None if token is None else token.strip()  # files of secrets end with a line
    if token == "":
        raise ConfigError("The token is empty. Leave it out, or give a long random one.")
    _check_device(device)
    stored = Bank(bank, create=False)
    told = _trained_with(stored)
    torch.manual_seed(told.seed)  # as a base that is drawn at random was in training
    network, stated = load_base(base, weights=weights, options=_options(base_option))
    scale = numbers("--mean", mean, float), numbers("--std", std, float)
    preprocessing = _preprocessing(told, stated, *scale)
    side = image_size or told.image_size
    shape = row_shape(input_shape)
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
        max_queue_bytes=size_in_bytes(max_queue_bytes),
        max_answers=max_answers,
        mixed=not one_task_at_a_time,
        token=token,
        # By a name that a stranger makes to mean this machine, their page could ask in a browser.
        hosts=(*LOCAL, *(allow_host or ())) if host in LOCAL and token is None else None,
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


def _check_device(device: str | None) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # each backend has its own
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(f"--device: torch cannot use '{device}' here: {reason}.") from None


def _trained_with(bank: Bank) -> Trained:
    """What the experiment of the first tasks says of base and data."""
    for name in bank.tasks()[:10]:
        with suppress(BankError):  # a damaged task is no reason not to serve the others
            facts = bank.info(name)["facts"]
            if isinstance(facts.get("experiment"), dict):
                return trained(facts)
    return Trained()


def _options(given: list[str] | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--base-option is KEY=VALUE, found '{text}'.")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--base-option {key}: '{value}' is no YAML value.") from None
    return options


def _preprocessing(
    told: Trained,
    stated: Preprocessing | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> Preprocessing:
    """How pixels are scaled: as asked for, else as in training, else as the base's library says."""
    mean, std = mean or told.mean, std or told.std
    if mean or std:
        return Preprocessing(mean=mean or (0.5,), std=std or (0.5,))
    return stated or Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)
