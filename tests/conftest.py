"""What every test needs: reproducible random numbers, vision libraries on any build of torch."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch


def _declare_missing_vision_operators() -> torch.library.Library | None:
    """Let torchvision be imported on a torch without the operators that its wheel was built for.

    Importing it registers shape functions for operators that its own binary declares; where that
    binary does not load, declaring their schemas first is enough for models, which never call them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        pass
    else:
        return None
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    pooled = (
        "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
    )
    sizes = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
    grad = "Tensor grad, Tensor rois"
    for name, extra in {"roi_align": ", int sampling_ratio, bool aligned", "roi_pool": ""}.items():
        result = "Tensor" if name == "roi_align" else "(Tensor, Tensor)"
        library.define(f"{name}({pooled}{extra}) -> {result}")
        library.define(f"_{name}_backward({grad}, float scale, {sizes}{extra}) -> Tensor")
    for name, extra in {"ps_roi_align": ", int sampling_ratio", "ps_roi_pool": ""}.items():
        library.define(f"{name}({pooled}{extra}) -> (Tensor, Tensor)")
        library.define(f"_{name}_backward({grad}, float scale, {sizes}{extra}) -> Tensor")
    library.define(
        "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
        "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, "
        "SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor"
    )
    library.define(
        "_deform_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor offset, "
        "Tensor mask, Tensor bias, SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, "
        "SymInt dilation_h, SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    return library


_LIBRARY = _declare_missing_vision_operators()

# Tiny networks on a shared machine: more threads cost more than they give.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    # PyTorch compiles one function at most so often in a process, for all tests together.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
