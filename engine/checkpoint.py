"""Checkpoint folders: safetensors files of either published layout, checked before any tensor is read.

Knows files, headers and names. How a tensor is cut for a rank is `engine.weights`' business.
"""

import json
import logging
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open

from engine.architecture import Architecture, is_hugging_face, mismatch
from engine.weights import DTYPE_BYTES, ModelWeights, TensorSpec, assemble, tensor_specs

MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it
NO_SCALE = 255  # the byte that is no number in E8M0, the format of MXFP4's scales (OCP MX specification, 5.4.1)

log = logging.getLogger(__name__)


def stored_names(specs: dict[str, TensorSpec], hugging_face: bool) -> dict[str, tuple[str, int]]:
    """Hugging Face name -> (name in the layout's files, first row there)."""
    return {name: (name, 0) if hugging_face else (spec.original, spec.row) for name, spec in specs.items()}


def load(
    path: str | Path, rank: int, tp: int, device: torch.device | str, dtype: torch.dtype, progress: bool = False
) -> tuple[Architecture, ModelWeights]:
    """Read one rank's weights from a checkpoint folder of either layout.

    Names, dtypes, shapes and file sizes are all checked before the first tensor is read. `progress` draws a bar if
    standard error is a terminal. Raises CheckpointError.
    """
    folder = find_folder(Path(path))
    config = _json_object(folder / "config.json")
    a = Architecture.from_config(config, str(folder / "config.json"))
    specs = tensor_specs(a)
    places = stored_names(specs, is_hugging_face(config))
    files = _check_tensors(folder, specs, places, warn=rank == 0)

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("loading weights"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        disable=not (progress and console.is_terminal),
    )
    with ExitStack() as stack:
        try:
            opened = {file: stack.enter_context(safe_open(file, "pt")) for file in {*files.values()}}
        except SafetensorError as error:
            raise mismatch(folder, found=error, expected="readable safetensors files") from error
        stack.enter_context(bar)
        task = bar.add_task("", total=sum(spec.bytes for spec in specs.values()))

        def read(name: str, index: tuple[slice, ...]) -> torch.Tensor:
            stored, row = places[name]
            first, stop, _ = index[0].indices(specs[name].shape[0])
            bar.advance(task, specs[name].bytes)  # of the full tensor, so that the bar ends at its total
            tensor: torch.Tensor = opened[files[stored]].get_slice(stored)[(slice(row + first, row + stop), *index[1:])]
            _check_numbers(files[stored], name, tensor)
            return tensor

        return a, assemble(a, rank, tp, device, dtype, read)


def _check_numbers(file: Path, name: str, tensor: torch.Tensor) -> None:
    """Raises CheckpointError for weights that would make every answer NaN."""
    if tensor.is_floating_point():
        wrong = not bool(tensor.isfinite().all())
    else:
        wrong = name.endswith("_scales") and bool((tensor == NO_SCALE).any())
    if wrong:
        raise mismatch(file, name, found="NaN or infinity among its values", expected="finite numbers")


def find_folder(path: Path) -> Path:
    """`path` itself or its `original/`, whichever holds config.json and safetensors files."""
    if not path.is_dir():
        raise mismatch(path, found="a file" if path.exists() else "nothing", expected="a checkpoint folder")
    for folder in (path, path / "original"):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    entries = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "an empty folder"
    raise mismatch(path, found=entries, expected="config.json and *.safetensors, here or in original/")


def _json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise mismatch(file, found=error, expected="JSON") from error
    if not isinstance(value, dict):
        raise mismatch(file, found=type(value).__name__, expected="a JSON object")
    return value


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A safetensors file's tensors, name -> (dtype, shape), after checking that all their bytes are there.

    The format: eight bytes little-endian header length, a JSON header, the data its offsets count into.
    """
    if not file.is_file():  # a folder, a pipe, or a link that leads nowhere
        raise mismatch(file, found="no file", expected="a safetensors file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        if not 8 < start <= size:
            raise mismatch(
                file,
                found=f"{size} bytes (truncated, or not a safetensors file)",
                expected=f"a header that ends at byte {start}",
            )
        if start > MAX_HEADER_BYTES:
            raise mismatch(file, found=f"a header of {start - 8} bytes", expected=f"at most {MAX_HEADER_BYTES}")
        raw = stream.read(start - 8)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {name: (str(t["dtype"]), tuple(map(int, t["shape"]))) for name, t in entries.items()}
        spans = {name: tuple(map(int, t["data_offsets"])) for name, t in entries.items()}
        spans = {name: (start + first, start + end) for name, (first, end) in spans.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise mismatch(file, found=repr(error), expected="a safetensors header") from error
    for name, (first, end) in sorted(spans.items(), key=lambda entry: entry[1]):
        dtype, shape = tensors[name]
        if end > size:
            raise mismatch(file, name, found=f"{size} bytes in the file (truncated)", expected=f"{end} at its end")
        expected = math.prod(shape) * DTYPE_BYTES.get(dtype, 0)
        if dtype in DTYPE_BYTES and end - first != expected:
            raise mismatch(file, name, found=f"{end - first} bytes", expected=f"{expected} for {dtype} {list(shape)}")
    if (end := max((end for _, end in spans.values()), default=start)) != size:
        raise mismatch(file, found=f"{size} bytes", expected=f"{end} by its header")
    return tensors


def _check_tensors(
    folder: Path, specs: dict[str, TensorSpec], places: dict[str, tuple[str, int]], warn: bool
) -> dict[str, Path]:
    """Stored name -> file, after checking that the folder holds every tensor in its dtype and shape."""
    files: dict[str, Path] = {}
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in _header(file).items():
            if name in files:
                raise mismatch(file, name, found=f"it in {files[name].name} too", expected="each tensor once")
            files[name], stored[name] = file, tensor

    # In the order of `specs` v comes after q and k, so its end is the number of rows of the tensor they share.
    expected = {
        place: ((row + specs[name].shape[0], *specs[name].shape[1:]), specs[name].dtypes)
        for name, (place, row) in places.items()
    }
    for name, (shape, dtypes) in expected.items():
        wanted = f"{' or '.join(dtypes)} {list(shape)}"
        if name not in files:
            where = ""
            for index in folder.glob("*.safetensors.index.json"):
                weight_map = _json_object(index).get("weight_map")
                if isinstance(weight_map, dict) and (stated := weight_map.get(name)):
                    where = f" in {stated}, as {index.name} says"
            raise mismatch(folder, name, found="no such tensor", expected=f"{wanted}{where}")
        dtype, stored_shape = stored[name]
        if dtype not in dtypes or stored_shape != shape:
            raise mismatch(files[name], name, found=f"{dtype} {list(stored_shape)}", expected=wanted)
    if warn and (extra := sorted(stored.keys() - expected.keys())):
        log.warning("%s: ignoring %d tensors GPT-OSS does not have, the first is %s", folder, len(extra), extra[0])
    return {name: files[name] for name in expected}
