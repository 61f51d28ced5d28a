"""What a result has to say about the machine it was measured on."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable
from typing import Any

import torch

import beniful_fast as bf


def _cpu_name() -> str:
    """With family and model, because virtual machines call several generations by one name."""
    facts: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                facts.setdefault(name.strip(), value.strip())
        return f"{facts['model name']}, family {facts['cpu family']} model {facts['model']}"
    except (OSError, KeyError):
        return facts.get("model name") or platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library or no driver: no GPU to describe
        return []
    fields: dict[str, Callable[[Any], Any]] = {
        "name": pynvml.nvmlDeviceGetName,
        "driver": lambda _: pynvml.nvmlSystemGetDriverVersion(),
        "sm_clock_mhz": lambda handle: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda handle: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "throttle_reasons": pynvml.nvmlDeviceGetCurrentClocksEventReasons,
    }
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return [{name: _told(ask, handle) for name, ask in fields.items()} for handle in handles]


def _told(ask: Callable[[Any], Any], handle: Any) -> Any:
    try:
        return ask(handle)
    except Exception as error:  # virtual machines withhold some of it
        return str(error)


def describe() -> dict[str, Any]:
    """Date, processor, GPUs, versions, threads and load."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "backends": {name: reason for name, (ok, reason) in bf.backends().items() if ok},
        "gpus": _gpus(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
