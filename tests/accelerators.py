"""Providers on machines without their devices: a GPU in software, and OpenVINO on any processor.

Import this before onnxruntime loads a provider's library: Mesa's GPU in software, lavapipe, stands
in for a GPU where it is installed.
"""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime as ort

from minismoe.runtime.providers import find_device

LAVAPIPE = Path("/usr/share/vulkan/icd.d/lvp_icd.json")
if LAVAPIPE.is_file():
    os.environ.setdefault("VK_DRIVER_FILES", str(LAVAPIPE))
    os.environ.setdefault("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1")


def as_if_intel() -> None:
    """Call the CPU Intel's: OpenVINO runs on others as well, but its plugin lists no others.

    github.com/microsoft/onnxruntime/pull/31981. The vendor is the C++ object's second number.
    """
    for device in (d.device for d in ort.get_ep_devices()):
        vendor = ctypes.c_uint32.from_address(
            ctypes.c_void_p.from_address(id(device) + object.__basicsize__).value + 4)
        if device.type == ort.OrtHardwareDeviceType.CPU and vendor.value == device.vendor_id:
            vendor.value = 0x8086


@cache
def missing(provider: str) -> str:
    """Why a provider cannot run here; "" if it can. A GPU in software is slow, and left to CI."""
    if provider.startswith("webgpu") and "CI" not in os.environ and os.environ.get(
            "VK_DRIVER_FILES") == str(LAVAPIPE):
        return "a GPU in software is tested where the variable CI is set"
    if provider.startswith("openvino"):
        as_if_intel()
    try:
        find_device(provider)
    except (ImportError, ValueError) as e:
        return str(e)
    return ""


def needs(provider: str) -> Any:
    """A mark that leaves a test out where a provider cannot run."""
    import pytest  # here, since a benchmark measures memory

    return pytest.mark.skipif(bool(missing(provider)), reason=missing(provider))
