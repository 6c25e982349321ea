"""Run by tests in a process where weft cannot be imported: load what was written, and run it.

Reads a JSON list of ``{"kind", "file", "net", "inputs", "outputs"}``; prints, for each, the largest
difference relative to the largest value, or the error.
"""

from __future__ import annotations

import json
import re
import sys

import plain_nets
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn


class First(nn.Module):
    """Calls a module on the first of its inputs."""

    def __init__(self, around: nn.Module) -> None:
        super().__init__()
        self.around = around

    def forward(self, x, *_, **__):
        return self.around(x)


def made(printed: str) -> nn.Module:
    """A module from what it prints, which is how it is made."""
    if inside := re.fullmatch(r"First\( \(around\): (.*) \)", printed):
        return First(made(inside[1]))
    return eval(f"nn.{printed}", {"nn": nn})


def load(kind: str, file: str, net: str):
    """What a file holds, as something to call."""
    if kind == "pickled":
        return torch.load(file, weights_only=False)
    if kind == "program":
        return torch.export.load(file).module()
    plain = plain_nets.NETS[net]().eval()
    with safe_open(file, "pt") as opened:
        changed = json.loads(opened.metadata().get("weft.changed", "{}"))
    for site, module in changed.items():
        plain.set_submodule(site, made(module))
    plain.load_state_dict(load_file(file), strict=True)
    return plain


def main() -> None:
    """Load and run everything that is asked for."""
    assert not [name for name in sys.modules if name.split(".")[0] == "weft"]
    sys.modules["weft"] = None  # type: ignore[assignment]  # importing it fails from here on
    torch.set_num_threads(1)
    results = []
    for work in json.load(sys.stdin):
        try:
            run = load(work["kind"], work["file"], work["net"])
            args, kwargs = torch.load(work["inputs"])
            expected = torch.load(work["outputs"])
            with torch.no_grad():
                found = run(*args, **kwargs)
            results.append(float((found - expected).abs().max() / expected.abs().max()))
        except Exception as error:
            results.append(repr(error))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
