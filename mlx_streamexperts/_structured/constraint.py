"""Lets only those tokens through that keep a reply to its shape; llguidance does the work.

A model may reason first, as its template has it. While a batch runs, nothing here may raise: a
grammar that fails ends its own reply and no other.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from .._errors import StreamError
from .shape import Shape, ShapeError, grammar

_MISSING = "replies in a format need llguidance: pip install llguidance, then start again"


class Vocabulary:
    """A model's tokens, as llguidance needs them. Takes about a second for 150,000 tokens.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`.

    Attributes:
        tokenizer: the same.
        tokens: llguidance's `LLTokenizer`.
        ends: ids of the tokens that end a reply.

    Raises:
        StreamError: llguidance is not installed, or cannot take this tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        try:
            from llguidance import hf, tiktoken
        except ImportError as e:
            raise StreamError(_MISSING) from e
        self.tokenizer, self.ends = tokenizer, sorted(tokenizer.eos_token_ids)
        inner = tokenizer._tokenizer
        try:
            if hasattr(inner, "backend_tokenizer"):
                self.tokens: Any = hf.from_tokenizer(inner, eos_token=self.ends)
            else:  # Kimi's
                self.tokens = tiktoken.lltokenizer_from_encoding(inner.model, eos_token=self.ends)
        except Exception as e:
            raise StreamError(f"llguidance cannot take this model's tokenizer: {e}") from e

    def reasoning(self, prompt: list[int]) -> bool | None:
        """Has this prompt begun the reply's reasoning (True) or ended it (False)? Else None."""
        tokenizer = self.tokenizer
        if not tokenizer.has_thinking:
            return None
        if tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt):
            return True
        tail = tokenizer.decode(prompt[-len(tokenizer.think_end_tokens) - 4 :])
        return False if tail.rstrip().endswith(tokenizer.think_end) else None

    def marker(self, text: str) -> str:
        """A marker in a grammar: the token that it is, or its characters."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1 and self.tokens.is_special_token(ids[0]):
            return f"<[{ids[0]}]>"
        return '"' + text.replace('"', '\\"') + '"'

    def grammar(self, shape: Shape) -> str:
        """The shape for this model.

        Raises:
            ShapeError: this model's tool calls cannot be forced.
        """
        parser = self.tokenizer.tool_parser
        name = None if parser is None else parser.__module__.rpartition(".")[2]
        template = self.tokenizer.chat_template
        return grammar(shape, name, template if isinstance(template, str) else "", self.marker)


class Constraint:
    """A shape for one request.

    Args:
        vocabulary: of the model.
        shape: what the reply must be.
        prompt: tokens of the prompt. It may have begun the model's reasoning, or ended it.

    Attributes:
        reasoning: whether the prompt has begun it (True), ended it (False), or neither (None).
        error: what went wrong while a reply was being held to the shape; None if nothing.

    Raises:
        ShapeError: there is no grammar for the shape.
    """

    def __init__(self, vocabulary: Vocabulary, shape: Shape, prompt: list[int]) -> None:
        from llguidance import LLMatcher

        if vocabulary.tokenizer.response_initial_state is not None:
            raise ShapeError("is not available for this model's form of reply", shape.param)
        self.vocabulary, self.reasoning = vocabulary, vocabulary.reasoning(prompt)
        self.error: str | None = None
        text = vocabulary.grammar(shape)
        self._matcher = LLMatcher(vocabulary.tokens, LLMatcher.grammar_from_lark(text), log_level=0)
        if self._matcher.is_error():
            raise ShapeError(f"cannot be turned into a grammar: {_why(self._matcher)}", shape.param)

    def processor(self) -> Processor:
        """A logits processor of mlx-lm's for one reply from its beginning."""
        return Processor(self, self._matcher.deep_copy())


class Processor:
    """Sets the logits of tokens that may not come next to minus infinity.

    Called once for each token, with the one before it as the last of `tokens`.
    """

    def __init__(self, constraint: Constraint, matcher: Any) -> None:
        tokenizer = constraint.vocabulary.tokenizer
        self._constraint, self._matcher = constraint, matcher
        self._ends = constraint.vocabulary.ends
        call = tuple(tokenizer.tool_call_start_tokens or ())
        # To mlx-lm a call ends reasoning, as a reply's end does: no format would come any more.
        self._barred = [*self._ends, *(call if len(call) == 1 else ())]
        self._opening: tuple[int, ...] = ()  # left of the marker that begins reasoning
        self._closing: tuple[int, ...] = ()  # the marker that ends it
        self._recent: tuple[int, ...] = ()
        self._thinks = constraint.reasoning is True
        if tokenizer.has_thinking:
            self._closing = tuple(tokenizer.think_end_tokens)
            if constraint.reasoning is None:
                self._opening = tuple(tokenizer.think_start_tokens)
        self._began = self._ended = False

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Tokens so far, [T], and logits, [1, V]."""
        if self._began:
            self._take(int(tokens[-1]))
        else:
            self._began = True
        if self._ended:
            return logits
        allowed = mx.array(self._allowed(logits.shape[-1]))  # [V]
        return mx.where(allowed, logits, mx.array(-mx.inf, logits.dtype))

    def _take(self, token: int) -> None:
        """Note the token that was chosen."""
        if self._ended or token in self._ends:
            self._ended = True
        elif self._thinks:
            self._recent = (*self._recent, token)[-len(self._closing) :]
            self._thinks = self._recent != self._closing
        elif self._opening and token == self._opening[0]:
            self._opening = self._opening[1:]
            self._thinks = not self._opening
        else:
            self._opening = ()
            if self._constraint.error is None and not self._matcher.consume_token(token):
                self._fail()

    def _allowed(self, count: int) -> np.ndarray:
        """Which of `count` tokens may come next, bool [count]."""
        allowed = np.zeros(count, bool)
        if self._thinks:
            allowed[:] = True
            allowed[[t for t in self._barred if t < count]] = False
            return allowed
        begun = self._opening and self._opening != tuple(
            self._constraint.vocabulary.tokenizer.think_start_tokens
        )
        if not begun and self._constraint.error is None:
            mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            bits = np.unpackbits(mask, bitorder="little")[:count]
            allowed[: len(bits)] = bits
            if self._matcher.is_error() or not allowed.any():
                self._fail()
        if self._constraint.error is not None:
            allowed[:] = False
            allowed[[t for t in self._ends if t < count]] = True
        elif self._opening and self._opening[0] < count:
            allowed[self._opening[0]] = True
        return allowed

    def _fail(self) -> None:
        self._constraint.error = _why(self._matcher) or "no token fits the format"


def _why(matcher: Any) -> str:
    """What llguidance says is wrong, without the grammar and the state that it adds."""
    return " ".join(str(matcher.get_error()).split())[:300]
