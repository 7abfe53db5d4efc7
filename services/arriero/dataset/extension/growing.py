"""New pieces on top of a BPE vocabulary, so that each can be reached.

Responsibility: how BPE cuts a text, and what must be added for a piece to come
out whole. Does not know files or ids.

BPE reaches a piece only by merging two that it has. A piece that was learnt
elsewhere, on other merges, may never come out; so pieces are added by what they
are cut into now, with helpers in between where two do not suffice. New merges
rank behind all old ones: a text that needs none of them is cut as before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["Growth", "by_pair", "by_piece", "ranked"]

# What a merge of two symbols is looked up by.
Key = Callable[[str, str], Hashable]


def by_pair(left: str, right: str) -> Hashable:
    """Merges are a list of pairs (`tokenizers`)."""
    return left, right


def by_piece(left: str, right: str) -> Hashable:
    """Any two symbols that make a piece together merge (SentencePiece, llama.cpp)."""
    return left + right


@dataclass
class Growth:
    """A vocabulary that grows.

    Args:
        known: every token's text.
        ranks: by key; the lowest merges first.
        key: `by_pair` or `by_piece`.
        new_symbols: whether single characters may be added.

    Attributes:
        pieces: added, in order.
        merges: added, in order: left, right.
    """

    known: set[str]
    ranks: dict[Hashable, int]
    key: Key
    new_symbols: bool
    pieces: list[str] = field(default_factory=list)
    merges: list[tuple[str, str]] = field(default_factory=list)

    def cut(self, text: str) -> list[str]:
        """The symbols that BPE leaves of a text that no pre-tokenizer cuts."""
        symbols = list(text)
        while len(symbols) > 1:
            best, at = None, -1
            for i in range(len(symbols) - 1):
                rank = self.ranks.get(self.key(symbols[i], symbols[i + 1]))
                if rank is not None and (best is None or rank < best):
                    best, at = rank, i
            if best is None:
                break
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        return symbols

    def grow(self, candidates: Iterable[str], room: int) -> None:
        """Add candidates in their order while there is room; what does not fit is passed over."""
        for piece in candidates:
            if room <= 0:
                return
            if piece not in self.known:
                room -= self._add(piece, room)

    def _add(self, piece: str, room: int) -> int:
        """Make one piece reachable; the number of pieces that took, 0 if there is no room."""
        pieces, merges = len(self.pieces), len(self.merges)
        keys: list[Hashable] = []
        fits = self._add_symbols(piece)
        symbols = self.cut(piece)
        while fits and len(symbols) > 1:
            left, right = symbols[:2]
            if left + right not in self.known:
                self.pieces.append(left + right)
                self.known.add(left + right)
            elif self.key is by_piece:
                fits = False  # a special token's text, which never merges
                break
            key = self.key(left, right)
            self.ranks[key] = len(self.ranks)
            keys.append(key)
            self.merges.append((left, right))
            symbols = self.cut(piece)
        if fits and len(self.pieces) - pieces <= room:
            return len(self.pieces) - pieces
        for key in keys:
            del self.ranks[key]
        self.known.difference_update(self.pieces[pieces:])
        del self.pieces[pieces:], self.merges[merges:]
        return 0

    def _add_symbols(self, piece: str) -> bool:
        missing = [symbol for symbol in dict.fromkeys(piece) if symbol not in self.known]
        if missing and not self.new_symbols:
            return False
        self.pieces += missing
        self.known.update(missing)
        return True


def ranked(scores: Mapping[str, float]) -> dict[Hashable, int]:
    """Ranks by piece, of scores: the highest merges first."""
    ordered = sorted(scores, key=lambda piece: -scores[piece])
    return {piece: rank for rank, piece in enumerate(ordered)}
