"""Files of this package: tensors and JSON metadata in one safetensors file, written whole or not at all, never unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .results import replacing


def write(path: str | os.PathLike[str], kind: str, version: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes `path` by way of a temporary file beside it.

    Args:
        kind: what it is, such as "Screener".
        version: of the kind's layout.
        tensors: any, on any device.
        meta: plain JSON values.

    Raises:
        ValueError: `path` is a folder.
    """
    from safetensors.torch import save

    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path: {path} is a folder, takes the name of a file to write, such as {kind.lower()}.safetensors")
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    payload = save(held, metadata={"format": _format(kind), "version": str(version), kind.lower(): json.dumps(meta)})
    with replacing(path) as temporary:
        temporary.write_bytes(payload)


def read(path: str | os.PathLike[str], kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, on the CPU, and metadata of what `write` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, truncated, or of another kind or version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path: {path} is a folder, takes a file that {kind}.save wrote")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            head = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: truncated, or no safetensors file ({error})") from None
    if head.get("format") != _format(kind):
        raise ValueError(f"{path}: a safetensors file, but no {kind}: its format is {head.get('format')!r}, takes {_format(kind)!r}")
    if head.get("version") != str(version):
        raise ValueError(f"{path}: version {head.get('version')} of the {kind} format, this release reads version {version}")
    try:
        return tensors, json.loads(head[kind.lower()])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: its metadata can't be read ({error})") from None


def _format(kind: str) -> str:
    return f"beniful_fast.{kind}"
