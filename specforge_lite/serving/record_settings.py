"""Settings of the recording proxy."""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path

from pydantic import field_validator

from specforge_lite.core.settings import Section, flag


class RecordSection(Section):
    """What is recorded, and where."""

    upstream: str = flag(..., "address of the server, http://127.0.0.1:30000")
    listen: str = flag("127.0.0.1:8001", "HOST:PORT of the proxy; it adds no authentication")
    out: Path = flag(..., "directory of the rows; it and its files are readable by their owner only")
    sampling_rate: float = flag(1.0, "share of the chats that is recorded", ge=0, le=1)
    max_gb: float = flag(10.0, "recording stops at this size of the directory; the proxy goes on", gt=0)
    file_mb: float = flag(256.0, "size at which the next file is begun", gt=0)
    redact: tuple[str, ...] = flag((), "regular expressions; what they match is replaced in every text")
    redact_function: str = flag("", "FILE.py:NAME, called with each row; returns the row to write, or None to drop it")

    @field_validator("upstream")
    @classmethod
    def _check_upstream(cls, value: str) -> str:
        url = urllib.parse.urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname or url.query:
            raise ValueError(f"expected http://HOST:PORT, found '{value}'")
        return value.rstrip("/")

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"expected HOST:PORT, found '{value}'")
        return value

    @field_validator("redact")
    @classmethod
    def _check_redact(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
        return value
