"""Bases by name: timm, torchvision, transformers, or a function in a file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from .data import Preprocessing
from .errors import ConfigError, MissingExtra, close_matches


def load_base(
    name: str, *, weights: str | Path | None = None, options: Mapping[str, Any] | None = None
) -> tuple[nn.Module, Preprocessing | None]:
    """A base network and the preprocessing that its library states for it.

    Args:
        name: ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME_OR_FOLDER`` or
            ``python:FILE.py:FUNCTION``.
        weights: a file of weights to load into it, safetensors or torch.
        options: arguments of the function that makes it. Pretrained weights are fetched unless
            ``weights`` is given or ``pretrained: false`` is among them.

    Returns:
        The module without a classifier, and its preprocessing if the library states one.

    Raises:
        ConfigError: an unknown prefix, name or function, or weights that do not fit.
        MissingExtra: the library is not installed.
    """
    prefix, colon, rest = name.partition(":")
    if not colon or prefix not in SOURCES:
        raise ConfigError(
            f"A base is named timm:NAME, torchvision:NAME, hf:NAME or python:FILE.py:FUNCTION, "
            f"found '{name}'.{close_matches(prefix, SOURCES)}"
        )
    chosen = dict(options or {})
    if prefix in ("timm", "torchvision"):
        chosen.setdefault("pretrained", weights is None)
    base, preprocessing = SOURCES[prefix](rest, chosen)
    if weights is not None:
        _load_weights(base, Path(weights), name)
    return base, preprocessing


def stated_image_size(name: str, options: Mapping[str, Any] | None = None) -> int:
    """The side of the images that a base was made for, as its library states it.

    Args:
        name: as for `load_base`; nothing is made or fetched but a configuration.
        options: as for `load_base`; ``img_size`` among them is the answer.

    Raises:
        ConfigError: nothing states a size, or the sides differ.
        MissingExtra: the library is not installed.
    """
    prefix, _, rest = name.partition(":")
    chosen = dict(options or {})
    size = chosen.get("img_size")
    if size is None and prefix in STATED:
        size = STATED[prefix](rest)
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    side = sides.pop() if len(sides) == 1 else None
    if not isinstance(side, int):
        found = "none" if size is None else f"{size}"
        raise ConfigError(
            f"data.image_size: base, but of the size of its images the base '{name}' states "
            f"{found}. Give the side of a square as a number."
        )
    return side


def _timm_size(name: str) -> Any:
    timm = _timm_with(name)
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # a tag that the model does not have
        raise ConfigError(f"timm has no weights '{name}': {error}") from None
    return None if config is None else config.input_size[1:]


def _torchvision_size(name: str) -> Any:
    models = _torchvision_with(name)
    # What weights are evaluated with; the enumeration fetches nothing.
    # Those of detectors and segmentation networks state none.
    return getattr(models.get_model_weights(name).DEFAULT.transforms(), "crop_size", None)


def _transformers_size(name: str) -> Any:
    _, _, processors = _import_transformers()
    try:
        processor = processors.from_pretrained(name)
        size = dict(getattr(processor, "crop_size", None) or processor.size)
    except (OSError, ValueError, AttributeError, TypeError, ImportError):
        return None  # no images, or no processor stored with the model
    return size.get("shortest_edge") or (size.get("height"), size.get("width"))


def _timm(name: str, options: dict[str, Any]) -> tuple[nn.Module, Preprocessing | None]:
    timm = _timm_with(name)
    base = _made(name, timm.create_model, name, **{"num_classes": 0, **options})
    config = timm.data.resolve_model_data_config(base)
    return base, Preprocessing(mean=tuple(config["mean"]), std=tuple(config["std"]))


def _torchvision(name: str, options: dict[str, Any]) -> tuple[nn.Module, Preprocessing | None]:
    models = _torchvision_with(name)
    pretrained = options.pop("pretrained")
    chosen = {"weights": "DEFAULT" if pretrained else None, **options}
    base = _made(name, models.get_model, name, **chosen)
    for classifier in ("fc", "classifier", "heads", "head"):
        if classifier in dict(base.named_children()):
            base.set_submodule(classifier, nn.Identity())
            break
    return base, Preprocessing.imagenet()


def _transformers(name: str, options: dict[str, Any]) -> tuple[nn.Module, Preprocessing | None]:
    configs, networks, processors = _import_transformers()
    if options.pop("pretrained", True):
        base = _made(name, networks.from_pretrained, name, **options)
    else:
        base = networks.from_config(_made(name, configs.from_pretrained, name, **options))
    try:
        processor = processors.from_pretrained(name)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    except (OSError, ValueError, AttributeError, TypeError, ImportError):
        return base, None  # no images, or no processor stored with the model
    return base, Preprocessing(mean=mean, std=std)


def _python(rest: str, options: dict[str, Any]) -> tuple[nn.Module, Preprocessing | None]:
    path, colon, function = rest.rpartition(":")
    file = Path(path)
    if not colon or not file.is_file():
        raise ConfigError(
            f"python:FILE.py:FUNCTION needs an existing file, found '{path or rest}'."
        )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Files of one project import each other by name.
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    make = vars(module).get(function)
    if not callable(make):
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ConfigError(
            f"{file} has no function '{function}'.{close_matches(function, functions)}"
        )
    base = _made(rest, make, **options)
    if not isinstance(base, nn.Module):
        raise ConfigError(f"'{rest}' returned {type(base).__name__}, expected a torch module.")
    return base, None


CLASSIFIERS = ("fc.", "classifier.", "head.", "heads.")
"""Names under which libraries keep the classifier."""

SOURCES: dict[str, Callable[[str, dict[str, Any]], tuple[nn.Module, Preprocessing | None]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _transformers,
    "python": _python,
}


STATED: dict[str, Callable[[str], Any]] = {
    "timm": _timm_size,
    "torchvision": _torchvision_size,
    "hf": _transformers_size,
}


def _timm_with(name: str) -> Any:
    """The library, which has this model."""
    try:
        import timm
    except ImportError:
        raise MissingExtra("A timm base", "timm") from None
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model '{name}'.{close_matches(name, timm.list_models())}")
    return timm


def _torchvision_with(name: str) -> Any:
    """The library's models, which have this one."""
    try:
        from torchvision import models
    except ImportError:
        raise MissingExtra("A torchvision base", "torchvision") from None
    known = models.list_models()
    if name not in known:
        raise ConfigError(f"torchvision has no model '{name}'.{close_matches(name, known)}")
    return models


def _import_transformers() -> tuple[Any, Any, Any]:
    """Its classes of configurations, networks and image processors."""
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel
    except ImportError:
        raise MissingExtra("A transformers base", "hf") from None
    return AutoConfig, AutoModel, AutoImageProcessor


def _made(name: str, make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a library's function; a wrong option or a failed download says what to do."""
    try:
        return make(*args, **options)
    except TypeError as error:
        raise ConfigError(f"The base '{name}' cannot be made with {options}: {error}.") from error
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"The base '{name}' could not be made: {error}\n"
            "Without access to its hub, give base.weights: FILE and options: {pretrained: false}."
        ) from error


def _load_weights(base: nn.Module, path: Path, name: str) -> None:
    if not path.is_file():
        raise ConfigError(f"base.weights: there is no file '{path}'.")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        # Whole checkpoints bring the classifier that the base is made without.
        known = base.state_dict()
        dropped = {n for n in tensors if n not in known and n.startswith(CLASSIFIERS)}
        base.load_state_dict({n: t for n, t in tensors.items() if n not in dropped}, strict=True)
    except Exception as error:  # what a damaged or foreign file raises depends on its bytes
        raise ConfigError(f"The weights '{path}' do not fit the base '{name}': {error}") from error
