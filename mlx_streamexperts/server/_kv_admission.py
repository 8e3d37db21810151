"""Keeps the memory of a server within its plan when it answers many requests at once.

A plan covers the KV cache of `context_tokens` tokens and passes over `prefill_tokens` tokens.
mlx-lm's server pads every request of a batch to the longest and keeps the KV caches of replies for
later prompts, without a bound on either. Here a request that does not fit beside the running ones
waits, and kept caches give way to running requests. Only the generation thread may call this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import (
    ArraysCache,
    LRUPromptCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

from .._errors import PassStoppedError
from .._experts.stream import is_streamed, stream
from .._loading.combinations import trims
from .._memory.budget import Plan
from .._memory.footprint import STEP, leaves, whole_steps
from .._prefixes.remembered import PrefixCache
from .._prefixes.shared import SharedPrompts
from .._prefixes.states import ROWS, grows, row_arrays, set_row_arrays
from ._audience import Audience, Waiting, lowest
from ._batches import PromptBatch, ReplyBatch, has_room, settle

# Logits, their logarithms and the sampler's copies, of this step and the next, in float32.
_LOGIT_BYTES = 24


class KVAdmission:
    """Decides which requests may run now, and how much memory kept prompt caches may take.

    Attributes:
        plan: the loaded model's; None while no streamed model is loaded.
        vocabulary: width of the model's logits.
        state_bytes: bytes that a sequence keeps whatever its length (linear attention, Mamba).
            None if the plan does not know, until a sequence has been measured.
        running: tokens of prompt and reply by sequence id of the batch.
        pending: tokens of the request that was admitted last and has not started.
        save_cache: takes the tokens and caches of a sequence that leaves a batch early.
        computed: hears of tokens of prompts, and the seconds that they took.
    """

    save_cache: Callable[[list[int], list[Any]], None] | None = None
    computed: Callable[[int, float], None] | None = None

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.state_bytes: int | None = None
        self.vocabulary = 1
        self.running: dict[int, int] = {}
        self.pending = 0

    def open(self, plan: Plan, vocabulary: int) -> None:
        """Apply the plan of a model that has been loaded."""
        self.plan, self.vocabulary = plan, vocabulary
        self.state_bytes = plan.state if plan.footprint is not None else plan.state or None

    def close(self) -> None:
        """Forget the plan: its model is about to be freed."""
        self.plan = self.computed = None

    def admit(self, tokens: int) -> bool:
        """Admit a request of `tokens` tokens (prompt and reply), or return False: it must wait.

        A request that would run alone is always admitted.
        """
        if self.running and self.plan is not None:
            sequences = len(self.running) + 1
            logits = _LOGIT_BYTES * self.vocabulary * sequences
            if logits > self.plan.work or self.state_bytes is None:
                return False
            if self._batch_bytes(tokens, *self.running.values()) > self.plan.kv_room:
                return False
        self.pending = tokens
        return True

    def withdraw(self) -> None:
        """Drop the pending request: it failed, or its KV cache now belongs to the prompt cache."""
        self.pending = 0

    def start(self, sequences: Iterable[int]) -> None:
        """Count the pending request as running, under its sequence id."""
        self.running.update(dict.fromkeys(sequences, self.pending))
        self.pending = 0

    def finish(self, sequences: Iterable[int]) -> None:
        """Release what these sequences took."""
        for sequence in sequences:
            self.running.pop(sequence, None)

    def finish_all(self) -> None:
        """Release what every sequence took: their batch is gone."""
        self.running.clear()

    def measure(self, caches: list[Any], sequences: int) -> None:
        """Take `state_bytes` from the caches of a running batch if the plan did not know it."""
        if self.state_bytes is None:
            self.state_bytes = constant_bytes(caches) // sequences

    def reply_limit(self, prompt_tokens: int) -> int | None:
        """Longest reply to a prompt of this length, in tokens; None if nothing bounds it."""
        return None if self.plan is None else self.plan.longest_context - prompt_tokens

    def prompt_cache_budget(self) -> int:
        """Bytes that the KV caches of earlier replies may take now."""
        if self.plan is None:
            return 1 << 62
        tokens = [t for t in (*self.running.values(), self.pending) if t]
        if not tokens:
            return self.plan.kv_room
        taken = self._batch_bytes(*tokens)
        if not self.running:  # outside a batch, steps are added to the rows in use
            taken += (self.pending + STEP - 1 - whole_steps(self.pending)) * self.plan.kv_token
        return max(0, self.plan.kv_room - taken)

    def chunk_tokens(self, stated: int, prompts: int) -> int:
        """Tokens that each of `prompts` prompts contributes to one pass; `stated` at most."""
        if self.plan is None:
            return stated
        return max(1, min(stated, self.plan.prefill_tokens // max(1, prompts)))

    def sequence_bytes(self, tokens: int) -> int:
        """KV cache of one sequence; 0 if nothing bounds it."""
        return 0 if self.plan is None else self._batch_bytes(tokens)

    def _batch_bytes(self, *tokens: int) -> int:
        """KV cache of a batch: every sequence takes as much as the longest."""
        assert self.plan is not None
        longest, sequences = max(tokens), len(tokens)
        rows = sequences * whole_steps(longest)
        # A pass pads its prompts to the longest chunk, whatever they hold already.
        rows += max(
            (
                n * (whole_steps(longest + chunk) - whole_steps(longest))
                for n in range(2, sequences + 1)
                if (chunk := min(self.chunk_tokens(longest, n), longest))
            ),
            default=0,
        )
        return rows * self.plan.kv_token + sequences * (self.state_bytes or 0)


class AdmittedBatch(BatchGenerator):
    """mlx-lm's batch; reports its sequences to `KVAdmission` and takes chunks of planned length.

    A pass over prompts whose clients have all left ends at once. The other sequences go on.
    """

    def __init__(
        self, model: Any, admission: KVAdmission, audience: Audience, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self._admission, self._audience = admission, audience
        self._clients: dict[int, Waiting | None] = {}  # by sequence id
        self._left: set[int] = set()  # sequences whose prompt was ended
        self._prompt_batch = PromptBatch.empty(
            model, self.sampler, prefill_step_size=self.prefill_step_size
        )
        self._generation_batch = ReplyBatch.empty(model, self.sampler)
        self._run_prompts = self._prompt_batch.prompt
        self._prompt_batch.prompt = self._prompts  # of this one object, which mlx-lm keeps
        self._stated_step = self.prefill_step_size
        self._lossy = None
        if is_streamed(model):
            self._lossy = stream(model).lossy
            stream(model).batches_copied_whole = False
        admission.finish_all()

    def insert_segments(self, *args: Any, **options: Any) -> Any:
        uids = super().insert_segments(*args, **options)
        self._admission.start(uids)
        self._clients.update(dict.fromkeys(uids, self._audience.latest))
        return uids

    def _prompts(self, tokens: list[list[int]]) -> None:
        """Run a chunk of every prompt; note the sequences if nobody waits for any of them."""
        uids = list(self._prompt_batch.uids)
        clients = [self._clients.get(uid) for uid in uids]
        start = time.perf_counter()
        try:
            with self._audience.waiting(clients):
                self._run_prompts(tokens)
            if self._admission.computed is not None:
                self._admission.computed(sum(map(len, tokens)), time.perf_counter() - start)
        except PassStoppedError:
            if not all(c is not None and c.gone() for c in clients):
                raise
            for client in clients:
                if client is not None and client.context is not None:
                    client.context.stop()  # mlx-lm's loop then forgets the request
            self._left.update(uids)

    def remove(self, uids: Any, *args: Any, **options: Any) -> Any:
        replies, save = self._generation_batch, self._admission.save_cache
        ended = [  # by a stop string, or the client left
            (list(replies.tokens[i]), replies.extract_cache(i))
            for i, uid in enumerate(replies.uids)
            if uid in uids
        ]
        removed = super().remove(uids, *args, **options)
        settle(self._prompt_batch.prompt_cache)
        settle(replies.prompt_cache, *(caches for _, caches in ended))
        self._admission.finish(uids)
        for uid in uids:
            self._clients.pop(uid, None)
        if save is not None:
            for tokens, caches in ended:
                save(tokens, caches)
        return removed

    def next(self) -> Any:
        waiting = len(self._prompt_batch) + len(self._unprocessed_sequences)
        prompts = min(waiting, self.prefill_batch_size)
        self.prefill_step_size = self._admission.chunk_tokens(self._stated_step, prompts)
        if self._lossy is not None:  # requests share their passes: the most exact one decides
            self._lossy.use_level(lowest(self._clients.values()))
        prompt_responses, responses = super().next()
        if self._left:  # before anybody keeps their caches, which lack the tokens of that pass
            self.remove(list(self._left))
            self._left.clear()
        if sequences := len(self._generation_batch):
            self._admission.measure(self._generation_batch.prompt_cache, sequences)
        ended = [r.uid for r in responses if r.finish_reason is not None]
        self._admission.finish(ended)
        for uid in ended:
            self._clients.pop(uid, None)
        return prompt_responses, responses


def constant_bytes(caches: list[Any]) -> int:
    """Bytes of those caches that do not grow with their sequences."""
    inner = [c for cache in caches for c in getattr(cache, "caches", [cache])]
    return sum(c.nbytes for c in inner if isinstance(c, ArraysCache))


def made_even(tokens: list[int], caches: list[Any]) -> int:
    """Remove from the caches of a sequence what not all of them hold.

    mlx-lm's loop for draft models does not run the last token that the model chose itself, and the
    draft model's caches may lack one more. mlx-lm keeps them under all tokens nevertheless, and
    what went on from there would have wrong positions.

    Args:
        tokens: those that the caches shall hold.
        caches: of all models that run the sequence.

    Returns:
        How many of the tokens all caches hold now; 0 if that is none, or if a cache holds more than
        these and does not go back exactly.
    """
    held = {c.offset for c in leaves(caches) if isinstance(getattr(c, "offset", None), int)}
    count = min([*held, len(tokens)])
    if held <= {count}:
        return count
    if not (trims(caches) and can_trim_prompt_cache(caches)):
        return 0
    for cache in leaves(caches):
        cache.trim(cache.offset - count)
    return count


class Remembering(Protocol):
    """The models' provider.

    Attributes:
        model: the loaded one.
        prefixes: its prompts on the drive; None if none are kept.
    """

    model: Any
    prefixes: PrefixCache | None


class BoundedPromptCache(LRUPromptCache):
    """mlx-lm's cache of earlier prompts and replies, within what running requests leave.

    Prompts share the memory of what they begin with. With a prefix cache, what is not in memory is
    looked for on the drive, and everything that comes in goes there too. A request for a lower
    lossy level than the server's takes nothing from memory, which may come from more lossy passes.
    """

    def __init__(
        self,
        admission: KVAdmission,
        *args: Any,
        provider: Remembering | None = None,
        audience: Audience | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._admission, self._provider, self._audience = admission, provider, audience
        self._shared = SharedPrompts()

    @property
    def nbytes(self) -> int:
        return int(super().nbytes) + self._shared.nbytes

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> Any:
        # A fetched cache may share memory with its origin until one of them is written, so fetch
        # first and drop what no longer fits afterwards.
        latest = None if self._audience is None else self._audience.latest
        if latest is not None and latest.lossy is not None:
            found, rest = None, tokens
        else:
            found, rest = super().fetch_nearest_cache(model, tokens)
        self.trim_to(n_bytes=self._admission.prompt_cache_budget())
        provider = self._provider
        if provider is not None and (kept := provider.prefixes) is not None:
            caches = make_prompt_cache(provider.model)
            beyond = len(tokens) - len(rest) if found is not None else 0

            def room(count: int, _: int) -> bool:
                nonlocal found, rest
                found, rest = None, tokens  # shorter: never in memory beside what is read
                return has_room(provider.model, self._admission.sequence_bytes(count))

            if end := kept.restore(caches, tokens[:-1], beyond=beyond, room=room):
                found, rest = caches, tokens[end:]
        if found is not None and not rest:  # the last token must run, or there are no logits
            if not (trims(found) and can_trim_prompt_cache(found)):
                return None, tokens
            trim_prompt_cache(found, 1)
            rest = tokens[-1:]
        for cache in filter(grows, leaves(found or ())):  # mlx-lm keeps the rows that it trims
            for name in ROWS:
                arrays = [a[..., : cache.offset, :] for a in row_arrays(cache, name)]
                set_row_arrays(cache, name, arrays)
        return found, rest

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], **options: Any
    ) -> None:
        count = made_even(tokens, prompt_cache)
        if not count:
            return
        tokens = tokens[:count]
        if self._provider is not None and self._provider.prefixes is not None:
            self._provider.prefixes.save(tokens, prompt_cache)
        can_trim = trims(prompt_cache)
        states = sum(c.nbytes for c in leaves(prompt_cache) if not grows(c))

        def room(added: int) -> bool:
            most = self._admission.prompt_cache_budget() - added - states
            self.trim_to(n_bytes=most)
            return self.nbytes <= most

        shared = self._shared.share(model, tokens, prompt_cache, room)
        if shared is None:
            return
        if not can_trim:
            shared.never_trim()
        # mlx-lm goes through what it keeps and copies it, and nothing else.
        super().insert_cache(model, tokens, shared, **options)  # type: ignore[arg-type]

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        super().trim_to(n_sequences=n_sequences)
        while n_bytes is not None and len(self) and self.nbytes > n_bytes:
            super().trim_to(n_sequences=len(self) - 1)
