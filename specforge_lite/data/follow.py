"""Training on recorded traffic as it comes (`train --follow DIR`): each row once, oldest first.

    rank 0     traffic_NNNNNN.jsonl -> TrafficReader -> TrafficRow --.     reads, tokenizes and refuses, once for all
    all ranks  FollowPlan <- refill ---------------------------------'     cuts the rows into steps

    plan = reader.plan(batch_size=4, rank=0, world_size=1)
    plan.refill(world.on_main)
    step = next(plan.steps())             # a PlannedStep; None where too few rows have come

Which rows make a step depends on their order alone, never on when they came, so a run that was killed goes on as if it
had not been. Memory is that of a few steps and of the hashes of SEEN_ROWS rows.
"""

from __future__ import annotations

import base64
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from specforge_lite.core.errors import DataError
from specforge_lite.core.files import key_digest
from specforge_lite.core.log import warn
from specforge_lite.data.conversations import RowRejected, one_line
from specforge_lite.data.reading import MAX_ROW_BYTES, BadRow, parse_line
from specforge_lite.data.sampler import PlannedStep, plan_steps
from specforge_lite.data.tokenize import RowTokenizer, TokenRow
from specforge_lite.types import TokenizedSample

SEEN_ROWS = 1 << 20  # a row is a duplicate of one of so many distinct rows before it; about 100 bytes each
STEPS_AHEAD = 4
ROWS_AT_ONCE, SECONDS_AT_ONCE = 64, 5.0  # that one `read` gives or takes, so that no rank waits long for the first
MAX_NAMES = 100


@dataclass(frozen=True)
class TrafficRow:
    """A row to train on. after: where the reader stood behind it."""

    tokens: TokenRow
    after: dict[str, Any]

    def to_json(self) -> list[Any]:
        """For the other ranks."""
        arrays = (self.tokens.input_ids, self.tokens.loss_mask)
        return [self.tokens.sample_id, *(base64.b64encode(part.tobytes()).decode() for part in arrays), self.after]

    @classmethod
    def from_json(cls, value: list[Any]) -> TrafficRow:
        """What `to_json` returned."""
        name, ids, mask, after = value
        decode = base64.b64decode
        return cls(TokenRow(name, np.frombuffer(decode(ids), np.int32), np.frombuffer(decode(mask), np.bool_)), after)


class TrafficReader:
    """Reads the files of a recorder, or of several after each other, and goes on where new rows come.

    models: names under which the target was served; rows of others are refused. Without names every row is taken, and
    each name that is not the target's is told once. mask_token_id: rows that are trained on this token are refused.
    counts: rows that were left out, by reason. fingerprint: of all that decides ids and masks besides the rows.
    """

    def __init__(self, directory: Path, tokenizer: RowTokenizer, target: str, models: tuple[str, ...] = ()) -> None:
        self.directory, self.mask_token_id, self.fingerprint = directory, -1, key_digest(tokenizer.key())
        self._tokenizer, self._models = tokenizer, frozenset(models)
        self._known = {"", Path(target).name}
        self._file: BinaryIO | None = None
        self._number = self._offset = self._line = self._rows = 0
        self._ended = False  # a later file is there: nothing is written to this one any more
        self.counts: Counter[str] = Counter()
        self._order: deque[int] = deque()
        self._seen: set[int] = set()

    # ------------------------------------------------------------------------------------------------------- position

    def state(self) -> dict[str, Any]:
        """File, place in it, rows so far; JSON."""
        facts = {"file": self._number, "offset": self._offset, "line": self._line, "rows": self._rows}
        return {**facts, "left_out": dict(self.counts)}

    def seen_before(self, rows: int) -> str:
        """Hashes of the newest SEEN_ROWS of the first `rows` rows, as text."""
        newest = list(islice(self._order, max(0, len(self._order) - (self._rows - rows))))
        return base64.b64encode(np.array(newest, dtype=np.uint64).tobytes()).decode()

    def seek(self, state: dict[str, Any], seen: str) -> None:
        """Go on behind the row whose `after` is `state`."""
        self._number, self._offset, self._line, self._rows = (state[k] for k in ("file", "offset", "line", "rows"))
        self.counts = Counter(state["left_out"])
        self._order = deque(np.frombuffer(base64.b64decode(seen), dtype=np.uint64).tolist())
        self._seen, self._file, self._ended = set(self._order), None, False

    def bytes_behind(self) -> int:
        """Bytes that were recorded and not read yet."""
        files = self._files()
        return max(0, sum(path.stat().st_size for n, path in files.items() if n >= self._number) - self._offset)

    def plan(self, **sizes: Any) -> FollowPlan:
        """The steps of this rank; sizes as those of `FollowPlan`."""
        return FollowPlan(self, **sizes)

    # ----------------------------------------------------------------------------------------------------------- rows

    def read(self, num_rows: int) -> list[TrafficRow]:
        """The next rows, at most so many; fewer where no more have come. Raises DataError for a file that cannot be
        read."""
        rows: list[TrafficRow] = []
        end = time.monotonic() + SECONDS_AT_ONCE
        while len(rows) < num_rows and time.monotonic() < end:
            try:
                line = self._next_line()
            except OSError as error:
                raise DataError(f"{error.filename or self.directory}: {error.strerror or error}") from None
            if line is None:
                break
            try:
                rows.append(self._row(line))
            except RowRejected as rejected:
                self._leave_out(rejected)
        return rows

    def _row(self, line: bytes) -> TrafficRow:
        parsed = parse_line(line, self._line)
        if isinstance(parsed, BadRow):
            raise RowRejected(parsed.reason, parsed.detail)
        row = self._tokenizer(parsed.value)
        self._check_model(str(parsed.value.get("model") or ""))
        if row.refused:
            raise RowRejected("refused", row.refused)
        if not row.loss_mask.any():
            kind = "beyond-max-length" if row.span_cut_off else "no-answer"
            raise RowRejected(kind, "it has no token to train on")
        if (row.input_ids[row.loss_mask] == self.mask_token_id).any():
            raise RowRejected("mask-token", f"the answer holds the draft's mask token {self.mask_token_id}")
        digest = blake2b(row.input_ids.tobytes() + row.loss_mask.tobytes(), digest_size=8).digest()
        number = int.from_bytes(digest, "little")
        if number in self._seen:
            raise RowRejected("duplicate", "")
        self._seen.add(number)
        self._order.append(number)
        if len(self._order) > SEEN_ROWS:
            self._seen.discard(self._order.popleft())
        self._rows += 1
        return TrafficRow(row, self.state())

    def _check_model(self, name: str) -> None:
        if self._models and name not in self._models:
            raise RowRejected("other-model", f"recorded from '{one_line(name, 80)}'; --follow-models takes others")
        if not self._models and Path(name).name not in self._known and len(self._known) < MAX_NAMES:
            self._known.add(Path(name).name)
            warn(
                f"{self._place}: recorded from '{one_line(name, 80)}', is that the target? A draft learns what its own"
                " target says; --follow-models NAME takes the rows of that name only"
            )

    def _leave_out(self, rejected: RowRejected) -> None:
        """Count a row; the first of each kind is named."""
        self.counts[rejected.reason] += 1
        if self.counts[rejected.reason] == 1 and rejected.reason != "duplicate":
            warn(f"{self._place}: left out ({rejected.reason}): {rejected}; others of this kind are counted only")

    # ---------------------------------------------------------------------------------------------------------- files

    @property
    def _place(self) -> str:
        return f"{self._path(self._number)}:{self._line}"

    def _path(self, number: int) -> Path:
        return self.directory / f"traffic_{number:06d}.jsonl"

    def _files(self) -> dict[int, Path]:
        """The files by number, ascending."""
        found = {path.stem.rpartition("_")[2]: path for path in self.directory.glob("traffic_*.jsonl")}
        return {int(number): found[number] for number in sorted(filter(str.isdecimal, found), key=int)}

    def _next_line(self) -> bytes | None:
        """The next line, whole but for the last one of a file that a crash ended; None where there is none yet."""
        while True:
            if self._file is None and (path := self._files().get(self._number)) is not None:
                self._file = open(path, "rb")  # noqa: SIM115  (closed where the next one begins)
                self._file.seek(self._offset)
            line = self._file.readline(MAX_ROW_BYTES + 1) if self._file is not None else b""
            if line.endswith(b"\n") or len(line) > MAX_ROW_BYTES or (line and self._ended):
                self._offset, self._line = self._offset + len(line), self._line + 1
                return line
            if self._file is not None:
                self._file.seek(self._offset)  # half a line is read again once it is whole
            later = [number for number in self._files() if number > self._number]
            if not later:
                return None
            if not self._ended and self._file is not None:
                self._ended = True  # seen after the read: there may be lines that were written in between
                continue
            if self._file is not None:
                self._file.close()
            self._file, self._ended = None, False
            self._number, self._offset, self._line = later[0], 0, 0


@dataclass(eq=False)
class FollowPlan:
    """The endless sequence of steps of one rank, as `BatchPlan` is for a file; also the samples of those steps.

    A step is `batch_size` rows per micro batch, or what fits into one packed bin of `max_tokens_per_batch`, times
    accumulation steps, times ranks. captures: this rank asks for its samples (with `--sp-size` one of a group does), so
    they are kept until it has. num_planned: steps that rows have come for since the start.
    """

    reader: TrafficReader
    _: KW_ONLY
    batch_size: int = 1
    accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1
    max_tokens_per_batch: int | None = None
    captures: bool = True
    num_planned: int = field(default=0, init=False)
    epoch: int = field(default=0, init=False)
    steps_per_epoch: float = field(default=math.inf, init=False)

    def __post_init__(self) -> None:
        self._state = self.reader.state()
        self._waiting: deque[TrafficRow] = deque()
        self._ready: deque[PlannedStep] = deque()
        self._samples: dict[int, TokenizedSample] = {}

    def state_dict(self) -> dict[str, Any]:
        """Where the plan stood at its start; that of a later step is its `state_after`."""
        return {**self._state, "epoch": 0}

    def saved(self, state: dict[str, Any]) -> dict[str, Any]:
        """A step's state with what a checkpoint needs besides. Rank 0, which reads, has it."""
        return {**state, "seen": self.reader.seen_before(state["rows"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `saved` returned."""
        self._state = {key: value for key, value in state.items() if key != "seen"}
        self.reader.seek(self._state, state["seen"])

    def refill(self, on_main: Callable[[Callable[[], Any]], Any]) -> None:
        """Take in rows that have come, for a few steps at most. Every rank calls it at the same time.

        on_main: `World.on_main`; only rank 0 reads, and says when it is enough: other ranks may be less far ahead.
        """

        def more() -> list[list[Any]]:
            enough = len(self._ready) >= STEPS_AHEAD
            return [] if enough else [row.to_json() for row in self.reader.read(ROWS_AT_ONCE)]

        while received := on_main(more):
            self._waiting.extend(map(TrafficRow.from_json, received))
            while size := self._next_size():
                self._plan([self._waiting.popleft() for _ in range(size)])

    def steps(self) -> Iterator[PlannedStep | None]:
        """The steps in their order; None where the next one's rows have not come, and then again."""
        while True:
            yield self._ready.popleft() if self._ready else None

    def __getitem__(self, number: int) -> TokenizedSample:
        """The sample of a planned row, once."""
        return self._samples.pop(number)

    def remaining_steps(self, num_epochs: int) -> float:
        """There is no end to them."""
        return math.inf

    def missing(self) -> str:
        """What the next step waits for, in words."""
        if self.max_tokens_per_batch is None:
            return f"{len(self._waiting)} of {self._groups * self.batch_size} rows"
        return f"{len(self._waiting)} rows, which do not fill {self._groups} x {self.max_tokens_per_batch} tokens yet"

    @property
    def _groups(self) -> int:
        return self.accumulation_steps * self.world_size

    def _next_size(self) -> int:
        """How many of the waiting rows are the next step; 0 where that is not known yet."""
        if self.max_tokens_per_batch is None:
            size = self._groups * self.batch_size
            return size if len(self._waiting) >= size else 0
        from specforge_lite.data.packing import PACKING_WINDOW, pack

        lengths = [len(row.tokens.input_ids) for row in islice(self._waiting, PACKING_WINDOW + 1)]
        # Best fit leaves no two bins half empty, so that many tokens fit in any case.
        start = int(np.searchsorted(np.cumsum(lengths), self._groups * self.max_tokens_per_batch // 2))
        for size in range(max(1, start), len(lengths)):
            if size == PACKING_WINDOW or len(pack(lengths[: size + 1], self.max_tokens_per_batch)) > self._groups:
                return size
        return 0

    def _plan(self, rows: list[TrafficRow]) -> None:
        first = rows[0].after["rows"]
        plan = plan_steps(
            [len(row.tokens.input_ids) for row in rows],
            [int(row.tokens.loss_mask.sum()) for row in rows],
            batch_size=self.batch_size,
            accumulation_steps=self.accumulation_steps,
            rank=self.rank,
            world_size=self.world_size,
            shuffle=False,
            max_tokens_per_batch=self.max_tokens_per_batch,
        )
        step = next(plan.steps())
        batches = [[first + i for i in batch] for batch in step.micro_batches]
        if self.captures:
            self._samples |= {first + i: rows[i].tokens.to_sample() for batch in step.micro_batches for i in batch}
        self._ready.append(replace(step, micro_batches=batches, state_after={**rows[-1].after, "epoch": 0}))
        self.num_planned += 1
