"""What kind of token: number, name, punctuation, whitespace, code keyword, other word, control token.

Decided by the word the token lies in, so that `ap` of `apples` is a word and `1` of `x1` is a name. In code (between
fences, or in fill-in-the-middle rows) a word is a keyword or a name, after a comment sign it is read as prose.
"""

from __future__ import annotations

import keyword
import re

CLASSES = ("number", "name", "punctuation", "whitespace", "keyword", "word", "control")
# Python's own, and the common ones of C, C++, Java, JavaScript, Go, Rust and shells.
OTHER_KEYWORDS = """
auto bool byte case catch char const constexpr default defer do done double echo enum esac export extends extern false
fi final finally float fn func function go goto impl implements int interface let local long loop match mod mut
namespace new nil null nullptr override package print private protected pub public range self short signed sizeof static
str struct super switch template then this throw throws trait true type typedef typename union unsafe unsigned use using
var virtual void volatile where
"""
KEYWORDS = frozenset([*keyword.kwlist, *OTHER_KEYWORDS.split()])
_NUMBER = re.compile(r"\d[\d_]*([eE]\d+)?|0[xXbBoO][\da-fA-F_]+")
_COMMENT = re.compile(r"#|//|/\*")
_INNER_CAPITAL = re.compile(r"[a-z\d][A-Z]|[A-Z]{2}")


def classify(piece: str, before: str, after: str = "", in_code: bool = False) -> str:
    """Class of the token `piece` that stands between the texts `before` and `after`; control tokens are the caller's.

    >>> classify(" apples", "He has 12")
    'word'
    """
    core = piece.strip()
    if not core:
        return "whitespace"
    start = next((i for i, letter in enumerate(piece) if _in_word(letter)), None)
    if start is None:
        return "punctuation"
    left, word = _word_at(piece, start, before, after)
    if _NUMBER.fullmatch(word):
        return "number"
    if in_code and not _COMMENT.search(left.rpartition("\n")[2]):
        return "keyword" if word in KEYWORDS else "name"
    return "name" if _is_name(word, left) else "word"


def is_in_fence(before: str) -> bool:
    """True inside a block of code between ``` fences."""
    return before.count("```") % 2 == 1


def _in_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


def _word_at(piece: str, start: int, before: str, after: str) -> tuple[str, str]:
    """(text before the word, the word) for the word that has the letter at `start` of `piece` in it."""
    left, right = before + piece[:start], piece[start:] + after
    first = len(left)
    while first > 0 and _in_word(left[first - 1]):
        first -= 1
    end = next((i for i, letter in enumerate(right) if not _in_word(letter)), len(right))
    return left[:first], left[first:] + right[:end]


def _is_name(word: str, left: str) -> bool:
    """In prose: an identifier, or a capital letter that does not start a sentence."""
    mixed = any(letter.isdigit() for letter in word) and any(letter.isalpha() for letter in word)
    if "_" in word.strip("_") or mixed or _INNER_CAPITAL.search(word):
        return True
    if not word[:1].isupper() or word == "I":
        return False
    gap = left[len(left.rstrip()) :]
    last = left.rstrip().rstrip("\"'*(_#>-")[-1:]
    return bool(last) and last not in ".!?:" and "\n" not in gap
