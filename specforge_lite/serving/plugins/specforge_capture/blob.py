"""One captured sample as bytes: the safetensors layout, with a checksum of the data in its `__metadata__`.

    8 bytes  header length N, little endian
    N bytes  JSON: {"__metadata__": {...}, "input_ids": {"dtype", "shape", "data_offsets"}, "aux": ..., "last": ...}
    rest     input_ids [L] int64, aux [L, A, H], last [L, H]; `checksum` covers exactly this part

Letters: L tokens of the sample, A aux layers, H hidden size.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

try:
    import xxhash
except ImportError:  # a vLLM that was not installed from our list: slower, and the trainer reads which one it was
    xxhash = None  # type: ignore[assignment]

FORMAT = "specforge-capture-2"
CHUNK_BYTES = 512 << 10  # hashed, then copied while it still lies in a core's cache
_DTYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16", "torch.int64": "I64"}
_NO_CHECKSUM = "0" * 16


class _Crc32:
    def __init__(self) -> None:
        self._crc = 0

    def update(self, data: memoryview) -> None:
        self._crc = zlib.crc32(data, self._crc)

    def intdigest(self) -> int:
        return self._crc


class Blob:
    """A sample laid out as buffers, which are never joined.

    aux [L, A, H] and last [L, H] are CPU tensors. Raises ValueError if the three disagree on L: a partial sample is
    never written.
    """

    def __init__(self, input_ids: Sequence[int], aux: Any, last: Any, facts: dict[str, str]) -> None:
        import torch

        ids = torch.tensor(list(input_ids), dtype=torch.int64)
        if not len(ids) == aux.shape[0] == last.shape[0]:
            rows = f"{aux.shape[0]} aux rows, {last.shape[0]} last rows"
            raise ValueError(f"{len(ids)} tokens, {rows}: prompt is incomplete")
        kind = {"checksum_kind": "crc32" if xxhash is None else "xxh3_64", "checksum": _NO_CHECKSUM}
        header: dict[str, Any] = {"__metadata__": {"format": FORMAT, **kind, **facts}}
        self._data: list[memoryview] = []
        offset = 0
        for name, tensor in (("input_ids", ids), ("aux", aux), ("last", last)):
            raw = tensor.detach().contiguous().view(torch.uint8).reshape(-1).numpy().data
            dtype, shape = _DTYPES[str(tensor.dtype)], list(tensor.shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(raw)]}
            offset += len(raw)
            self._data.append(raw)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # keeps the data aligned for whoever maps the file
        self._header = len(text).to_bytes(8, "little") + text
        self.num_bytes = len(self._header) + offset

    def chunks(self) -> Iterator[tuple[int, bytes | memoryview]]:
        """(offset, bytes) in pieces of `CHUNK_BYTES`, each hashed just before; the header, which needs the checksum,
        comes last."""
        digest = _Crc32() if xxhash is None else xxhash.xxh3_64()
        offset = len(self._header)
        for raw in self._data:
            for start in range(0, len(raw), CHUNK_BYTES):
                piece = raw[start : start + CHUNK_BYTES]
                digest.update(piece)
                yield offset, piece
                offset += len(piece)
        checksum = f"{digest.intdigest():016x}".encode()
        yield 0, self._header.replace(b'"checksum": "' + _NO_CHECKSUM.encode(), b'"checksum": "' + checksum, 1)

    def buffers(self) -> list[memoryview]:
        """Header and data, for a store that takes whole buffers in order."""
        *_, (_, header) = self.chunks()
        return [memoryview(header), *self._data]
