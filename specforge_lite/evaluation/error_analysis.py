"""Where the draft fails: by position, by kind of token, by token, by context, with samples.

A miss at position k: the draft's guess of step k is not the target's most probable token. Position 0 is the token that
matters most: nothing after a miss can be accepted. So tokens, pairs, contexts and samples are counted at position 0.

Letters: N tokens of a batch, K steps (positions).
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch

from specforge_lite.core.errors import DataError
from specforge_lite.data.encoding import TokenizerSpec
from specforge_lite.data.fim import recognise_family
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


class ErrorAnalysis:
    """Add every evaluated batch (an observer of `evaluate_draft`), then read `to_dict`."""

    def __init__(
        self, draft: Draft, head: TargetHead, tokenizer: Any, num_steps: int, num_top: int = 20, num_samples: int = 5
    ) -> None:
        self._head, self._tokenizer, self._num_steps = head, tokenizer, num_steps
        self._num_top, self._num_samples = num_top, num_samples
        self._control = set(tokenizer.all_special_ids)
        self._code_ids = fim_token_ids(tokenizer)
        self._in_vocabulary = draft.t2d.cpu()
        self.num_documents = 0
        # Keys: ("step", k, kind), and at position 0 ("place", group), ("token", id, kind), ("context", ids)
        self.seen: Counter[Any] = Counter()
        self.missed: Counter[Any] = Counter()
        self.pairs: Counter[tuple[int, int]] = Counter()
        self.outside: Counter[str] = Counter()  # misses at position 0 that no draft of this vocabulary could avoid
        self._samples: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)

    def __call__(self, output: StepOutput, batch: DraftBatch) -> None:
        """Count one batch; `output` with `collect_rows`."""
        assert output.correct_NK is not None
        assert output.supervised_NK is not None
        assert output.guess_NK is not None
        predicted_NK = output.guess_NK.cpu()
        with torch.no_grad():  # the target's most probable token after token u, at place u
            expected_N = torch.cat([self._head.logits(part).argmax(-1).cpu() for part in batch.last_NH.split(256)])
        correct_NK, supervised_NK = output.correct_NK.cpu(), output.supervised_NK.cpu()
        for index, (start, stop) in enumerate(zip(batch.doc_offsets[:-1], batch.doc_offsets[1:])):
            rows = slice(start, stop)
            document = Document(batch.sample_ids[index], batch.input_ids_N[rows].tolist(), self._tokenizer)
            first_of = {
                place: first
                for first, end in answers_of(batch.loss_mask_N[rows].tolist())
                for place in range(first, end)
            }
            expected, predicted = expected_N[rows].tolist(), predicted_NK[rows, 0].tolist()
            kinds: dict[int, str] = {}
            for row, k in supervised_NK[rows].nonzero().tolist():
                place = row + 2 + k  # of the token that is guessed
                token = expected[place - 1]
                if place not in kinds:
                    kinds[place] = self._kind(document, place, token)
                missed = not bool(correct_NK[start + row, k])
                self._count(missed, ("step", k, kinds[place]))
                if k == 0:
                    group = place_group(place - first_of.get(place, place))
                    context = tuple(document.ids[max(0, place - CONTEXT_TOKENS) : place])
                    self._count(missed, ("place", group), ("token", token, kinds[place]), ("context", context))
                    if missed:
                        self._add_miss(document, place, kinds[place], token, predicted[row])
        self.num_documents += len(batch.sample_ids)

    def _count(self, missed: bool, *keys: Any) -> None:
        self.seen.update(keys)
        if missed:
            self.missed.update(keys)

    def _kind(self, document: Document, place: int, token: int) -> str:
        if token in self._control:
            return "control"
        before = document.text[: document.starts[place]]
        in_code = bool(self._code_ids & document.id_set) or is_in_fence(before)
        if document.ids[place] == token:
            return classify(document.pieces[place], before, document.text[document.starts[place + 1] :][:64], in_code)
        return classify(self._text(token), before, "", in_code)

    def _add_miss(self, document: Document, place: int, kind: str, token: int, guess: int) -> None:
        self.pairs[token, guess] += 1
        self.outside[kind] += not bool(self._in_vocabulary[token])
        miss = {
            "sample_id": document.sample_id,
            "place": place,  # index of the token in its sample
            "kind": kind,
            "before": document.text[: document.starts[place]][-SHOWN_CHARACTERS:],
            "expected": self._text(token),
            "guessed": self._text(guess),
        }
        key = hashlib.sha256(f"{document.sample_id}:{place}".encode()).hexdigest()  # random, the same in every run
        kept = self._samples[kind]
        kept.append((key, miss))
        if len(kept) > 4 * self._num_samples:
            self._samples[kind] = self._shown_samples(kind)

    def _shown_samples(self, kind: str) -> list[tuple[str, dict[str, Any]]]:
        return heapq.nsmallest(self._num_samples, self._samples.get(kind, []), key=itemgetter(0))

    def _text(self, *tokens: int) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    # -------------------------------------------------------------------------------------------------------- results

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the lists of tokens, contexts and pairs hold the `num_top` with most misses."""
        whole = self._tally(*(("step", 0, kind) for kind in CLASSES))
        pairs = sorted(self.pairs.items(), key=lambda item: (-item[1], item[0]))
        places = [("place", group) for group in range(len(ANSWER_PLACES)) if self.seen["place", group]]
        return {
            "num_samples": self.num_documents,
            "num_tokens": whole["total"],
            "num_missed": whole["missed"],
            "positions": [self._position(k) for k in range(self._num_steps)],
            "classes": [
                {
                    "class": kind,
                    **tally,
                    "share_of_misses": tally["missed"] / max(whole["missed"], 1),
                    "outside_draft_vocabulary": self.outside[kind],
                }
                for kind, tally in self._by_kind(0).items()
            ],
            "answer_places": [{"from": ANSWER_PLACES[key[1]], **self._tally(key)} for key in places],
            "tokens": self._worst_tokens(),
            "contexts": [
                {"before": self._text(*ids), **self._tally(("context", ids))}
                for ids in self._worst({key[1]: [key] for key in self.missed if key[0] == "context"})
            ],
            "pairs": [
                {"expected": self._text(token), "guessed": self._text(guess), "count": count}
                for (token, guess), count in pairs[: self._num_top]
            ],
            "samples": [miss for kind in CLASSES for _, miss in self._shown_samples(kind)],
        }

    def _tally(self, *keys: Any) -> dict[str, Any]:
        total, missed = (sum(counts[key] for key in keys) for counts in (self.seen, self.missed))
        return {"total": total, "missed": missed, "accuracy": 1 - missed / max(total, 1)}

    def _by_kind(self, k: int) -> dict[str, dict[str, Any]]:
        return {kind: self._tally(("step", k, kind)) for kind in CLASSES if self.seen["step", k, kind]}

    def _position(self, k: int) -> dict[str, Any]:
        whole = self._tally(*(("step", k, kind) for kind in CLASSES))
        return {"position": k, **whole, "classes": self._by_kind(k)}

    def _worst(self, keys_of: dict[Any, list[Any]]) -> list[Any]:
        """Those with most misses, of equals the rarer one first. keys_of: with at least one miss each."""
        tallies = {name: self._tally(*keys) for name, keys in keys_of.items()}
        order = sorted(tallies, key=lambda name: (-tallies[name]["missed"], tallies[name]["total"], name))
        return order[: self._num_top]

    def _worst_tokens(self) -> list[dict[str, Any]]:
        missed = {key[1] for key in self.missed if key[0] == "token"}
        kinds = {token: [("token", token, kind) for kind in CLASSES] for token in missed}
        found = []
        for token in self._worst(kinds):
            guesses = sorted(((n, guess) for (wanted, guess), n in self.pairs.items() if wanted == token), reverse=True)
            found.append(
                {
                    "token": self._text(token),
                    "id": token,
                    "class": max(kinds[token], key=self.seen.__getitem__)[2],
                    "in_draft_vocabulary": bool(self._in_vocabulary[token]),
                    **self._tally(*kinds[token]),
                    "guessed_instead": [{"guessed": self._text(guess), "count": n} for n, guess in guesses[:3]],
                }
            )
        return found


class Document:
    """A sample as text. pieces[i]: text of token i, pieces joined are the whole; starts[i]: where it begins."""

    def __init__(self, sample_id: str, ids: list[int], tokenizer: Any) -> None:
        self.sample_id, self.ids, self.id_set = sample_id, ids, set(ids)
        self.pieces = token_texts(tokenizer, ids)
        self.starts = list(accumulate(map(len, self.pieces), initial=0))
        self.text = "".join(self.pieces)


def place_group(place: int) -> int:
    """Index into ANSWER_PLACES of a place in an answer."""
    return max(index for index, first in enumerate(ANSWER_PLACES) if place >= first)


def fim_token_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that only fill-in-the-middle rows have; empty for a tokenizer without them."""
    vocabulary = TokenizerSpec.from_tokenizer(tokenizer).vocabulary
    try:
        family = recognise_family(vocabulary)
    except DataError:
        return set()
    return {vocabulary[token] for token in (family.prefix, family.suffix, family.middle)}
