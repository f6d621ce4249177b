"""Where the draft fails: by position, by kind of token, by token, by context, with samples.

A miss at position k: the draft's guess of step k is not the target's most probable token. Position 0 is the token that
matters most: nothing after a miss can be accepted. So tokens, pairs, contexts and samples are counted at position 0.

Letters: N tokens of a batch, K steps (positions).
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from specforge_lite.core.errors import DataError
from specforge_lite.data.encoding import TokenizerSpec
from specforge_lite.data.fim import recognise_family
from specforge_lite.evaluation.predictions import predict_tokens
from specforge_lite.evaluation.token_classes import CLASSES, classify, is_in_fence
from specforge_lite.inference.output import token_texts
from specforge_lite.model.draft import Draft
from specforge_lite.model.target_head import TargetHead
from specforge_lite.training.evaluate import answers_of
from specforge_lite.types import DraftBatch, StepOutput

CONTEXT_TOKENS = 2
SHOWN_CHARACTERS = 60
# Borders of the table by place in the answer: tokens 0, 1-3, 4-15, 16-63, 64-255, 256 and later.
ANSWER_PLACES = (0, 1, 4, 16, 64, 256)


@dataclass
class Tally:
    """Tokens seen, and those of them missed."""

    total: int = 0
    missed: int = 0

    def add(self, missed: bool) -> None:
        self.total += 1
        self.missed += missed

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, accuracy included."""
        return {"total": self.total, "missed": self.missed, "accuracy": 1 - self.missed / max(self.total, 1)}


@dataclass(frozen=True, order=True)
class Miss:
    """One failure for a person to look at. `key` orders them at random, the same in every run."""

    key: str
    sample_id: str
    place: int
    kind: str
    before: str
    expected: str
    guessed: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `place`: index of the token in its sample, `before`: the text in front of it."""
        return {name: getattr(self, name) for name in ("sample_id", "place", "kind", "before", "expected", "guessed")}


@dataclass
class Document:
    """A sample as text. pieces[i]: text of token i, pieces joined are the whole; starts[i]: where it begins."""

    ids: list[int]
    pieces: list[str]
    starts: list[int] = field(init=False)
    text: str = field(init=False)

    def __post_init__(self) -> None:
        self.text = "".join(self.pieces)
        self.starts = [0]
        for piece in self.pieces:
            self.starts.append(self.starts[-1] + len(piece))


class ErrorAnalysis:
    """Add every evaluated batch (an observer of `evaluate_draft`), then read `to_dict`."""

    def __init__(
        self, draft: Draft, head: TargetHead, tokenizer: Any, num_steps: int, num_top: int = 20, num_samples: int = 5
    ) -> None:
        self._draft, self._head, self._tokenizer, self._num_steps = draft, head, tokenizer, num_steps
        self._num_top, self._num_samples = num_top, num_samples
        self._control = set(tokenizer.all_special_ids)
        self._code_ids = fim_token_ids(tokenizer)
        self._in_vocabulary = draft.t2d.cpu()
        self.num_documents = 0
        self.by_step: list[dict[str, Tally]] = [defaultdict(Tally) for _ in range(num_steps)]
        self.by_place = [Tally() for _ in ANSWER_PLACES]
        self.by_token: dict[int, Tally] = defaultdict(Tally)
        self.by_context: dict[tuple[int, ...], Tally] = defaultdict(Tally)
        self.pairs: Counter[tuple[int, int]] = Counter()
        self.outside: Counter[str] = Counter()  # misses at position 0 that no draft of this vocabulary could avoid
        self._token_kind: dict[int, Counter[str]] = defaultdict(Counter)
        self._samples: dict[str, list[tuple[str, Miss]]] = defaultdict(list)

    def __call__(self, output: StepOutput, batch: DraftBatch) -> None:
        """Count one batch; `output` with `collect_rows`."""
        assert output.correct_NK is not None
        assert output.supervised_NK is not None
        predicted_NK = predict_tokens(self._draft, self._head, batch, self._num_steps).cpu()
        expected_N = self._target_choices(batch)
        correct_NK, supervised_NK = output.correct_NK.cpu(), output.supervised_NK.cpu()
        for index, (start, stop) in enumerate(zip(batch.doc_offsets[:-1], batch.doc_offsets[1:])):
            rows = slice(start, stop)
            ids = batch.input_ids_N[rows].tolist()
            self._add_document(
                batch.sample_ids[index],
                Document(ids, token_texts(self._tokenizer, ids)),
                answers_of(batch.loss_mask_N[rows].tolist()),
                expected_N[rows].tolist(),
                predicted_NK[rows].tolist(),
                (supervised_NK[rows], correct_NK[rows]),
            )

    def _target_choices(self, batch: DraftBatch) -> torch.Tensor:
        """[N] int64: the target's most probable token after token u, at place u."""
        with torch.no_grad():
            return torch.cat([self._head.logits(part).argmax(-1).cpu() for part in batch.last_NH.split(256)])

    def _add_document(
        self,
        sample_id: str,
        document: Document,
        answers: list[tuple[int, int]],
        expected: list[int],
        predicted: list[list[int]],
        flags: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        supervised_LK, correct_LK = flags
        self.num_documents += 1
        in_code = bool(self._code_ids & set(document.ids))
        first_of = {place: first for first, end in answers for place in range(first, end)}
        kinds: dict[int, str] = {}
        for row, k in supervised_LK.nonzero().tolist():
            place = row + 2 + k  # of the token that is guessed
            token = expected[place - 1]
            if place not in kinds:
                kinds[place] = self._kind(document, place, token, in_code)
            missed = not bool(correct_LK[row, k])
            self.by_step[k][kinds[place]].add(missed)
            if k == 0:
                self._add_first(document, place, kinds[place], token, missed)
                self.by_place[place_group(place - first_of.get(place, place))].add(missed)
                if missed:
                    self._add_miss(sample_id, document, place, kinds[place], token, predicted[row][0])

    def _kind(self, document: Document, place: int, token: int, in_code: bool) -> str:
        if token in self._control:
            return "control"
        before = document.text[: document.starts[place]]
        in_code = in_code or is_in_fence(before)
        if document.ids[place] == token:
            return classify(document.pieces[place], before, document.text[document.starts[place + 1] :][:64], in_code)
        return classify(self._text(token), before, "", in_code)

    def _add_first(self, document: Document, place: int, kind: str, token: int, missed: bool) -> None:
        self.by_token[token].add(missed)
        self._token_kind[token][kind] += 1
        self.by_context[tuple(document.ids[max(0, place - CONTEXT_TOKENS) : place])].add(missed)

    def _add_miss(self, sample_id: str, document: Document, place: int, kind: str, token: int, guess: int) -> None:
        self.pairs[token, guess] += 1
        self.outside[kind] += not bool(self._in_vocabulary[token])
        key = hashlib.sha256(f"{sample_id}:{place}".encode()).hexdigest()
        before = document.text[: document.starts[place]][-SHOWN_CHARACTERS:]
        miss = Miss(key, sample_id, place, kind, before, self._text(token), self._text(guess))
        kept = self._samples[kind]
        kept.append((key, miss))
        if len(kept) > 4 * self._num_samples:
            self._samples[kind] = heapq.nsmallest(self._num_samples, kept)

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    # -------------------------------------------------------------------------------------------------------- results

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the lists of tokens, contexts and pairs hold the `num_top` with most misses."""
        missed = sum(tally.missed for tally in self.by_step[0].values())
        return {
            "num_samples": self.num_documents,
            "num_tokens": sum(tally.total for tally in self.by_step[0].values()),
            "num_missed": missed,
            "positions": [self._position(k) for k in range(self._num_steps)],
            "classes": [self._class(kind, missed) for kind in CLASSES if self.by_step[0][kind].total],
            "answer_places": [
                {"from": first, **tally.to_dict()} for first, tally in zip(ANSWER_PLACES, self.by_place) if tally.total
            ],
            "tokens": [
                {
                    "token": self._text(token),
                    "id": token,
                    "class": self._token_kind[token].most_common(1)[0][0],
                    "in_draft_vocabulary": bool(self._in_vocabulary[token]),
                    **tally.to_dict(),
                    "guessed_instead": self._guesses_for(token),
                }
                for token, tally in worst(self.by_token.items(), self._num_top)
            ],
            "contexts": [
                {"before": str(self._tokenizer.decode(list(ids), skip_special_tokens=False)), **tally.to_dict()}
                for ids, tally in worst(self.by_context.items(), self._num_top)
            ],
            "pairs": [
                {"expected": self._text(token), "guessed": self._text(guess), "count": count}
                for (token, guess), count in sorted(self.pairs.items(), key=lambda item: (-item[1], item[0]))
            ][: self._num_top],
            "samples": [
                miss.to_dict()
                for kind in CLASSES
                for _, miss in heapq.nsmallest(self._num_samples, self._samples.get(kind, []))
            ],
        }

    def _position(self, k: int) -> dict[str, Any]:
        classes = {kind: self.by_step[k][kind].to_dict() for kind in CLASSES if self.by_step[k][kind].total}
        whole = Tally(sum(c["total"] for c in classes.values()), sum(c["missed"] for c in classes.values()))
        return {"position": k, **whole.to_dict(), "classes": classes}

    def _class(self, kind: str, all_missed: int) -> dict[str, Any]:
        tally = self.by_step[0][kind]
        share = tally.missed / max(all_missed, 1)
        return {
            "class": kind,
            **tally.to_dict(),
            "share_of_misses": share,
            "outside_draft_vocabulary": self.outside[kind],
        }

    def _guesses_for(self, token: int) -> list[dict[str, Any]]:
        found = sorted(((n, guess) for (wanted, guess), n in self.pairs.items() if wanted == token), reverse=True)
        return [{"guessed": self._text(guess), "count": count} for count, guess in found[:3]]


def place_group(place: int) -> int:
    """Index into ANSWER_PLACES of a place in an answer."""
    return max(index for index, first in enumerate(ANSWER_PLACES) if place >= first)


def worst(tallies: Iterable[tuple[Any, Tally]], count: int) -> Sequence[tuple[Any, Tally]]:
    """Those with most misses, of equals the rarer one first; none without a miss."""
    found = [item for item in tallies if item[1].missed]
    return sorted(found, key=lambda item: (-item[1].missed, item[1].total, item[0]))[:count]


def fim_token_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that only fill-in-the-middle rows have; empty for a tokenizer without them."""
    vocabulary = TokenizerSpec.from_tokenizer(tokenizer).vocabulary
    try:
        family = recognise_family(vocabulary)
    except DataError:
        return set()
    return {vocabulary[token] for token in (family.prefix, family.suffix, family.middle)}
