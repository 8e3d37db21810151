"""Replies end at stop strings and name their tokens, however the text is cut into pieces."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.generate import TextStateMachine
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from mlx_streamexperts.server._replies import (
    Piece,
    Reply,
    StopText,
    TokenLogprobs,
    completion_logprobs,
)

STATES = TextStateMachine(
    {
        "normal": [("<think>", "reasoning"), ("<call>", "tool")],
        "reasoning": [("</think>", "normal")],
        "tool": [("</call>", "normal")],
    }
)


def up_to(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: the text before the stop string that ends first, the longer one of two."""
    for end in range(len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def fed(stop: StopText, pieces: list[str]) -> str:
    out = ""
    for piece in pieces:
        out += stop.feed(piece)
        if stop.found:
            return out
    return out + stop.flush()


@pytest.mark.parametrize("seed", range(300))
def test_where_text_is_cut_into_pieces_makes_no_difference(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices("ab\n", k=rng.randint(0, 20)))
    stops = ["".join(rng.choices("ab\n", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 4))]
    cuts = sorted(rng.choices(range(len(text) + 1), k=5))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stop = StopText(stops)
    assert (fed(stop, pieces), stop.found) == up_to(text, stops)


def test_text_goes_out_as_soon_as_it_can_be_no_stop_string() -> None:
    stop = StopText(["END"])
    assert stop.feed("the E") == "the "
    assert stop.feed("N") == ""
    assert stop.feed("E") == "EN"  # the last E may begin one
    assert stop.flush() == "E"


class Letters:
    """A tokenizer: a token is a character, but 0 and 1, halves of an e with an accent."""

    all_special_ids = (2,)

    def convert_ids_to_tokens(self, token: int) -> str:
        return "<0xC3>" if token == 0 else "<0xA9>"

    def decode(self, ids: list[int]) -> str:
        raw = b"".join(b"\xc3" if i == 0 else b"\xa9" if i == 1 else chr(i).encode() for i in ids)
        return raw.decode("utf-8", "replace")


def parsed(text: str, tools: object) -> dict[str, object]:
    """The parser: f(1)."""
    name, _, argument = text.partition("(")
    return {"name": name, "arguments": {"n": int(argument.removesuffix(")"))}}


def replied(
    texts: list[str],
    *,
    ids: list[int] | None = None,
    reason: str = "length",
    stops: tuple = (),
    single: bool = False,
) -> list[Piece]:
    ids = ids or [ord(t[-1]) for t in texts]
    responses = [
        SimpleNamespace(
            text=t,
            token=i,
            logprob=-float(n),
            top_tokens=({"id": i, "logprob": -float(n)},),
            finish_reason=reason if n + 1 == len(texts) else None,
        )
        for n, (t, i) in enumerate(zip(texts, ids, strict=True))
    ]
    context = SimpleNamespace(text_sm=STATES, initial_state="normal", tool_parser=parsed)
    tools = [{"function": {"name": "f"}}, {"function": {"name": "g"}}]
    reply = Reply(context, stops, Letters(), tools, "</call>", single=single)
    return list(reply.pieces(responses))


def whole(pieces: list[Piece]) -> Piece:
    total = Piece()
    for piece in pieces:
        assert total.finish_reason is None
        total += piece
    return total


def named(piece: Piece) -> str:
    return "".join(e["token"] for e in piece.logprobs or ())


def test_what_was_held_back_comes_at_the_end() -> None:
    """The beginning of a tag and of a stop string; mlx-lm drops it at a token that ends a reply."""
    texts, ids = ["a", "<", "t", "E", "N", ""], [97, 60, 116, 69, 78, 7]
    for reason in ("stop", "length"):
        got = whole(replied(texts, ids=ids, reason=reason, stops=("END",)))
        assert (got.text, got.finish_reason) == ("a<tEN", reason)


def test_reasoning_and_tool_calls_are_apart() -> None:
    text = "<think>why</think>so <call>f(1)</call>then <call>g(2)</call>"
    for texts in (list(text), [text]):
        pieces = replied(texts, reason="stop")
        got = whole(pieces)
        assert (got.reasoning, got.text, got.finish_reason) == ("why", "so then ", "tool_calls")
        assert [(c.name, c.arguments) for c in got.calls] == [("f", '{"n": 1}'), ("g", '{"n": 2}')]
        assert len({c.id for c in got.calls}) == 2
        kinds = [k for p in pieces for k in ("reasoning", "text", "calls") if getattr(p, k)]
        order = [k for i, k in enumerate(kinds) if kinds[i - 1 : i] != [k]]
        assert order == ["reasoning", "text", "calls", "text", "calls"]
    got = whole(replied(list(text), reason="length"))
    assert got.finish_reason == "length"


def test_a_call_that_cannot_be_parsed_is_text() -> None:
    """mlx-lm drops it, and says that there were calls."""
    got = whole(replied(list("<call>f(x)</call> <call>g("), reason="stop"))
    assert (got.text, got.calls, got.finish_reason) == ("<call>f(x)</call> <call>g(", [], "stop")


def test_a_reply_can_end_after_its_first_call() -> None:
    pieces = replied(list("<call>f(1)</call><call>g(2)</call>"), single=True)
    assert len(pieces) == len("<call>f(1)</call>")  # no more was asked for
    got = whole(pieces)
    assert ([c.name for c in got.calls], got.finish_reason) == (["f"], "tool_calls")


def test_a_stop_string_ends_a_reply_anywhere() -> None:
    pieces = replied(list("one STOP two"), stops=("STOP",))
    assert len(pieces) == len("one STOP")  # no more was asked for
    got = whole(pieces)
    assert (got.text, got.finish_reason, named(got)) == ("one ", "stop", "one ")
    got = whole(replied(list("<think>a STOP"), stops=("STOP",)))
    assert (got.reasoning, got.text, got.finish_reason) == ("a ", "", "stop")


@pytest.mark.parametrize("late", [0, 1])
def test_tokens_are_named_when_their_text_has_gone_out(late: int) -> None:
    """Some detokenizers give a token's text with the next one."""
    text = "aSbSTcSTOPd"
    texts = [("", *text)[i + 1 - late] for i in range(len(text))]
    pieces = replied(texts, ids=list(map(ord, text)), stops=("STOP",))
    sent = names = ""
    for piece in pieces:
        sent += piece.text
        names += named(piece)
        assert len(names) <= len(sent)
    assert sent == names == "aSbSTc"
    offsets = [e["text_offset"] for p in pieces for e in p.logprobs or ()]
    assert offsets == [0, 1, 2, 3, 4, 5]


def test_only_special_tokens_have_no_bytes() -> None:
    got = whole(replied(["", "é", ".", "\x02"], ids=[0, 1, 46, 2]))
    assert got.text == "é.\x02"
    assert [e["bytes"] for e in got.logprobs or ()] == [[0xC3], [0xA9], [46], None]
    assert [e["id"] for e in got.logprobs or ()] == [0, 1, 46, 2]


def byte_letters(detokenizer: Any) -> TokenizerWrapper:
    """GPT-2's kind: a letter for each byte, and for some words."""
    words = [*sorted(ByteLevel.alphabet()), "Ġw", "ĠĠ"]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("Ġ", "w"), ("Ġ", "Ġ")]))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=inner), detokenizer, [0])


def pieces_and_bytes(detokenizer: Any) -> TokenizerWrapper:
    """SentencePiece's kind: characters, and bytes for those that are not among them."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"Hiwrldab\n", "▁w"]
    vocabulary = {w: i for i, w in enumerate(words)}
    inner = Tokenizer(
        models.BPE(vocabulary, [("▁", "w")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=inner), detokenizer, [0])


@pytest.mark.parametrize("text", [" Hi 😀 wörld 日本", " a  b\n\n  wé", "é"])
@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_letters(BPEStreamingDetokenizer),
        byte_letters(NaiveStreamingDetokenizer),
        pieces_and_bytes(SPMStreamingDetokenizer),
    ],
    ids=["letters", "letters-naive", "pieces"],
)
def test_bytes_and_offsets_of_tokens_are_those_of_the_text(
    tokenizer: TokenizerWrapper, text: str
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer, entries, sent = tokenizer.detokenizer, [], ""
    names = TokenLogprobs(tokenizer)
    for i, token in enumerate(ids):
        detokenizer.add_token(token)
        if i + 1 == len(ids):
            detokenizer.finalize()
        top = ({"id": token, "logprob": -1.0}, {"id": 5, "logprob": -2.0})
        new = detokenizer.last_segment
        names.add(SimpleNamespace(token=token, logprob=-1.0, top_tokens=top), new)
        sent += new
        entries += names.take(len(sent))
    entries += names.rest(None)
    assert sent in (text, text.removeprefix(" "))
    assert b"".join(bytes(e["bytes"]) for e in entries) == text.encode()
    before, dropped = b"", len(text) - len(sent)
    for entry in entries:
        at = max(0, len(before.decode("utf-8", "ignore")) - dropped)
        assert entry["text_offset"] == at, entry
        before += bytes(entry["bytes"])
    assert all(len(top) == 2 for top in completion_logprobs(entries)["top_logprobs"])


def test_a_token_that_ends_a_reply_is_not_named() -> None:
    got = whole(replied(["a", "b", ""], ids=[97, 98, 7], reason="stop"))
    assert named(got) == got.text == "ab"


def test_a_token_keeps_the_space_before_it() -> None:
    tokenizer = pieces_and_bytes(NaiveStreamingDetokenizer)
    [token] = tokenizer.encode(" w", add_special_tokens=False)
    names = TokenLogprobs(tokenizer)
    names.add(SimpleNamespace(token=token, logprob=-1.0, top_tokens=()), "w")
    assert [e["token"] for e in names.rest(None)] == [" w"]


def test_logprobs_of_completions() -> None:
    top = [{"token": "a", "logprob": -0.5, "bytes": [97]}] * 2
    top += [{"token": "\ufffd", "logprob": -3.0, "bytes": [b]} for b in (0xF0, 0x9F)]
    one = {"token": "ab", "logprob": -0.5, "bytes": [97, 98], "top_logprobs": top}
    got = completion_logprobs([{**one, "text_offset": 0}, {**one, "text_offset": 2}])
    assert got["text_offset"] == [0, 2]
    assert got["tokens"] == ["ab", "ab"]
    assert got["token_logprobs"] == [-0.5, -0.5]
    assert got["top_logprobs"] == [{"a": -0.5, r"bytes:\xf0": -3.0, r"bytes:\x9f": -3.0}] * 2
