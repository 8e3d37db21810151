"""Cuts a reply into blocks of one kind each, for APIs whose replies are lists of blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .._replies import Call, Piece

Step = tuple[str, "Block", str]
"""What happens to a block: "begin", "more" with its new text, or "end"."""


@dataclass
class Block:
    """One part of a reply.

    Attributes:
        kind: "reasoning", "text" or "call".
        number: position in the reply.
        text: all of it so far; of a call, its arguments as JSON.
        call: of a call.
        cut: whether the reply was cut within it.
    """

    kind: str
    number: int
    text: str = ""
    call: Call | None = None
    cut: bool = False


class Blocks:
    """The blocks of one reply.

    White space alone makes no block of text: models write some between their calls.

    Attributes:
        all: every block so far.
    """

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None
        self._white: dict[str, str] = {}  # by kind of the block that it may begin

    def add(self, piece: Piece) -> Iterator[Step]:
        """What a piece does to the blocks."""
        if piece.reasoning:
            yield from self._append("reasoning", piece.reasoning)
        if piece.text:
            yield from self._append("text", piece.text)
        for call in piece.calls:
            yield from self.close()
            block = self._new("call", call)
            yield "begin", block, ""
            block.text = call.arguments
            yield "more", block, block.text
            yield from self.close()

    def close(self, cut: bool = False) -> Iterator[Step]:
        """End the block that is open, if one is. `cut`: because the reply is cut."""
        self._white = {}
        if self._open is not None:
            block, self._open = self._open, None
            block.cut = cut
            yield "end", block, ""

    def _append(self, kind: str, text: str) -> Iterator[Step]:
        if self._open is None or self._open.kind != kind:
            white = self._white.get(kind, "")
            yield from self.close()
            if not (white + text).strip():
                self._white = {kind: white + text}
                return
            text = white + text
            yield "begin", self._new(kind), ""
        assert self._open is not None
        self._open.text += text
        yield "more", self._open, text

    def _new(self, kind: str, call: Call | None = None) -> Block:
        self._open = Block(kind, len(self.all), "", call)
        self.all.append(self._open)
        return self._open


def blocks_of(pieces: Sequence[Piece]) -> list[Block]:
    """The blocks of a whole reply."""
    blocks = Blocks()
    for piece in pieces:
        for _ in blocks.add(piece):
            pass
    for _ in blocks.close(bool(pieces) and pieces[-1].finish_reason == "length"):
        pass
    return blocks.all
