"""One captured sample as bytes: the safetensors layout, with a checksum of the data in its `__metadata__`.

    8 bytes  header length N, little endian
    N bytes  JSON: {"__metadata__": {...}, "input_ids": {"dtype", "shape", "data_offsets"}, "aux": ..., "last": ...}
    rest     input_ids [L] int64, aux [L, A, H], last [L, H]; `crc32` covers exactly this part

Letters: L tokens of the sample, A aux layers, H hidden size.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

FORMAT = "specforge-capture-1"
_DTYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16", "torch.int64": "I64"}


def encode(input_ids: Sequence[int], aux: Any, last: Any, facts: dict[str, str]) -> list[memoryview]:
    """Lay a sample out as buffers to be written one after the other, without joining them.

    aux [L, A, H] and last [L, H] are CPU tensors. Raises ValueError if the three disagree on L: a partial sample is
    never written.
    """
    import torch

    ids = torch.tensor(list(input_ids), dtype=torch.int64)
    if not len(ids) == aux.shape[0] == last.shape[0]:
        raise ValueError(f"{len(ids)} tokens, {aux.shape[0]} aux rows, {last.shape[0]} last rows: prompt is incomplete")
    header: dict[str, Any] = {}
    buffers: list[memoryview] = []
    offset, crc = 0, 0
    for name, tensor in (("input_ids", ids), ("aux", aux), ("last", last)):
        raw = tensor.detach().contiguous().view(torch.uint8).reshape(-1).numpy().data
        header[name] = {
            "dtype": _DTYPES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        offset += len(raw)
        crc = zlib.crc32(raw, crc)
        buffers.append(raw)
    header["__metadata__"] = {"format": FORMAT, "crc32": f"{crc:08x}", **facts}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned for whoever maps the file
    return [memoryview(len(text).to_bytes(8, "little") + text), *buffers]
