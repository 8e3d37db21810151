"""The generation thread, and what a connection sees of it.

Adds to mlx-lm's thread what a promise needs: requests wait until memory has room for them; one
that fails, or whose client left, costs the others nothing; the model is freed at the end.
"""

from __future__ import annotations

import argparse
import gc
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from queue import Empty, Queue
from typing import Any, NoReturn

import mlx.core as mx
from mlx_lm import server as stock

from .._errors import PassStoppedError, StreamError
from .._progress import Progress
from .._structured.constraint import Constraint
from .._structured.shape import Shape, ShapeError
from ._audience import Audience, lowest
from ._context import enough
from ._kv_admission import KVAdmission
from ._models import ModelProvider
from ._refusals import Asked, BadRequestError, ClientGone, Refused, generation_failed
from ._request_counters import RequestCounters

_ALIVE_SECONDS = 1.0
_LONG_PROMPT = 1 << 16  # characters
_DROPPED = 1 << 16  # bytes after a request, each time that its client is looked for
_ALIVE = (-1, -1)  # in the place of mlx-lm's (tokens done, tokens in all)


class GenerationThread(stock.ResponseGenerator):
    """mlx-lm's thread that loads the model and generates for all requests.

    Attributes:
        admission: decides when a request starts.
        counters: of requests and tokens.
        ready: set once the default model is loaded, or has failed to load.
        failure: the error if it has.
        stopping: the server is being stopped; the pass under way ends, and its requests with it.
        audience: who waits for the pass under way.
    """

    model_provider: ModelProvider

    def __init__(
        self,
        provider: ModelProvider,
        prompt_cache: Any,
        counters: RequestCounters,
        audience: Audience,
    ) -> None:
        self.audience = audience
        self.counters, self.admission = counters, provider.admission
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self.stopping = False
        self._waiting: Any = None  # a request for which there is no room yet
        self._clients: dict[int, Client] = {}  # by id of the request
        self._replies: dict[Any, Client] = {}  # of running requests, by their queue
        self._tokenized: dict[int, Any] = {}  # by id of the request
        # Tokenizing 5 MB takes 770 MB meanwhile, and 4 s: one such prompt at a time. A tokenizer
        # that is Python has one prompt at a time, however short.
        self._long_prompt = threading.Lock()
        self.admission.save_cache = self._save_cache
        provider.should_stop = self._should_stop
        provider.forget_prompts = partial(prompt_cache.trim_to, n_sequences=0)
        super().__init__(provider, prompt_cache)

    def register(self, request: Any, client: Client) -> None:
        """Note whose request this is, before it is queued."""
        self._clients[id(request)] = client

    def unregister(self, request: Any) -> None:
        """Forget a request that is over."""
        self._clients.pop(id(request), None)

    def _generate(self) -> None:
        try:
            self.model_provider.load_default()
        except BaseException as e:
            self.failure, self._generation_failed = e, True
            return
        finally:
            self.ready.set()
        try:
            while not self._stop:
                try:
                    super()._generate()
                except PassStoppedError:  # the server is being stopped
                    self._fail_all(ClientGone())
                except Exception as e:
                    logging.exception("a batch failed, and its requests with it")
                    self._fail_all(e.with_traceback(None))  # the frames hold the batch
        finally:
            self._dismiss_all()
            self.model_provider.unload()
            mx.clear_streams()  # MLX aborts at exit if a stream of an ended thread is left

    def _fail_all(self, error: Exception) -> None:
        """End all running requests with this error; the next one starts afresh."""
        for reply in self._replies:
            reply.put(error)
        self._replies.clear()
        self.admission.finish_all()
        restore_random_state()
        gc.collect()
        mx.clear_cache()

    def _dismiss_all(self) -> None:
        """End all requests, running or waiting: mlx-lm's loop leaves them when it stops."""
        self._fail_all(ClientGone())
        waiting = [] if self._waiting is None else [self._waiting]
        self._waiting = None
        with suppress(Empty):
            while True:
                waiting.append(self.requests.get_nowait())
        for reply, *_ in waiting:
            reply.put(ClientGone())

    def _save_cache(self, tokens: list[int], caches: list[Any]) -> None:
        """Keep the KV cache of a reply that ended early, as mlx-lm keeps those of whole ones."""
        self.prompt_cache.insert_cache(
            self.model_provider.model_key, tokens, caches, cache_type="assistant"
        )

    def _next_request(self, timeout: float | None = None) -> Any:
        self.admission.withdraw()
        if self._is_distributed:  # every rank must decide the same, and only one knows the clients
            return super()._next_request(timeout)
        item, self._waiting = self._waiting, None
        if item is None:
            item = super()._next_request(timeout)
        if item is None:
            return None
        reply, request, args = item
        client = self._clients.get(id(request))
        self._replies = {q: c for q, c in self._replies.items() if not c.ended}
        if client is None or client.gone():
            reply.put(ClientGone())
            return None
        if not self.model_provider.is_loaded(args.model.model):
            if self.admission.running:  # requests for the loaded model finish first
                self._waiting = item
                return None
            # Nothing else is running. `_tokenize` counts it when its tokenizer has been loaded.
        else:
            try:
                tokens = self._count_tokens(request, args)
            except Exception as e:
                reply.put(e)
                return None
            if not self.admission.admit(tokens):
                self._waiting = item
                return None
        self._replies[reply] = client
        self.audience.latest = client
        return _Reply(reply, client), request, args

    def _should_stop(self) -> bool:
        """Shall the pass under way end? Ranks must decide alike, so theirs run to the end."""
        return not self._is_distributed and (self.stopping or self.audience.has_left())

    def progress(self, client: Client | None = None) -> Progress | None:
        """How far the prompts under way are.

        Args:
            client: whose prompt; all of them together if None.

        Returns:
            None if no prompt is under way.
        """
        follower = self.model_provider.follower
        running = [c for c in list(self._replies.values()) if c.prompt is not None]
        asked = running if client is None else [c for c in running if c is client]
        if follower is None or not asked:
            return None
        now, (part, _) = follower.now(), follower.pass_tokens_done()
        done = total = 0
        for c in asked:
            of = c.prompt or (0, 0)
            done += min(of[1], of[0] + part // len(running))
            total += of[1]
        begin, before = min(c.began for c in asked)
        read = max(0, now.read_bytes - before)
        return replace(
            now, tokens=done, total=total, read_bytes=read, seconds=time.perf_counter() - begin
        )

    def _await_response(self, response_queue: Any) -> Any:
        """The next response; `_ALIVE` after a second without one, once the prompt is taken."""
        if not getattr(response_queue, "began", False):
            response = super()._await_response(response_queue)
            response_queue.began = True
            return response
        try:
            return response_queue.get(timeout=_ALIVE_SECONDS)
        except Empty:
            if not self.generation_available():
                raise RuntimeError("generation thread died") from None
            return _ALIVE

    def _count_tokens(self, request: Any, args: Any) -> int:
        """Tokens of prompt and reply. mlx-lm's own `_tokenize` call later gets the same result."""
        tokenizer = self.model_provider.tokenizer
        if id(request) not in self._tokenized:
            self._tokenized = {id(request): (request, self._checked(tokenizer, request, args))}
        return len(self._tokenized[id(request)][1][0]) + args.max_tokens

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        known = self._tokenized.pop(id(request), None)
        if known is not None and known[0] is request:
            return known[1]
        result = self._checked(tokenizer, request, args)
        if not self._is_distributed:  # a model's first request: it runs alone
            self.admission.admit(len(result[0]) + args.max_tokens)
        return result

    def _checked(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """The request's tokens, which the loaded model can answer; shortens the reply to fit."""
        client = self._clients.get(id(request))
        result = None if client is None else client.take_tokens(tokenizer)
        if result is None:
            # Long prompts do not wait for each other here: all replies would wait with them.
            with nullcontext() if _runs_beside_others(tokenizer) else self._long_prompt:
                result = self._prompt(tokenizer, request, args)
        param = _param(request)
        prompt = result[0]
        if not prompt:
            raise BadRequestError("the prompt is empty: send some text", param)
        if (token := max(prompt)) >= self.model_provider.known_tokens:
            raise BadRequestError(
                f"the prompt contains token {token}, but the model knows only "
                f"{self.model_provider.known_tokens} tokens; its tokenizer knows more",
                param,
            )
        most = self.admission.reply_limit(0)
        check_length(len(prompt), most, param)
        if most is not None:
            args.max_tokens = min(args.max_tokens, most - len(prompt))
        self._hold_to_shape(args, tokenizer, prompt)
        self._try_out(args, tokenizer)
        return result

    def _prompt(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """The request's tokens as mlx-lm's `_tokenize` returns them, before any check of them."""
        if isinstance(request.prompt, list):  # of tokens
            return request.prompt, [request.prompt], ["assistant"], "normal", None
        asks_effort = getattr(args, "effort", None) is not None
        if asks_effort and "reasoning_effort" not in str(tokenizer.chat_template):
            raise BadRequestError(
                "reasoning_effort means nothing to this model's template; leave it out",
                "reasoning_effort",
            )
        sees = self.model_provider.processor is not None and tokenizer.has_chat_template
        if not sees and any(stock._image_parts(request.messages)):
            raise BadRequestError("this model takes text alone: leave the image out", "messages")
        try:
            return super()._tokenize(tokenizer, request, args)
        except Exception as e:  # the chat template failed, or does not know a role
            raise BadRequestError(f"the prompt cannot be turned into tokens: {e}") from e

    def tokenize_ahead(self, request: Any, args: Any, client: Client) -> None:
        """Turn a request's prompt into tokens in the thread of its connection.

        The generation thread then finds them at its client. It does so itself where this cannot:
        if the model is not loaded, or generates on several machines, if the prompt has pictures
        (whose arrays belong to a thread), or if the tokenizer is Python, which no thread runs
        beside another.

        Raises:
            BadRequestError: the prompt can never be answered.
            ClientGone: the client left before its turn.
        """
        loaded = self.model_provider.loaded
        if (
            self._is_distributed
            or loaded is None
            or loaded.path != args.model.model
            or not _runs_beside_others(loaded.tokenizer)
            or any(stock._image_parts(request.messages))
        ):
            return
        own = copy(request)
        own.messages = deepcopy(request.messages)  # mlx-lm writes into them
        with self._turn(loaded.tokenizer, request):
            if client.gone():
                raise ClientGone
            result = self._prompt(loaded.tokenizer, own, args)
            check_length(len(result[0]), loaded.most_tokens, _param(request))
        client.give_tokens(loaded.tokenizer, result)

    def _turn(self, tokenizer: Any, request: Any) -> AbstractContextManager[Any]:
        """Holds back what may not become tokens beside another prompt."""
        short = _characters(request) <= _LONG_PROMPT
        return nullcontext() if short and _runs_beside_others(tokenizer) else self._long_prompt

    def count_prompt(self, request: Any, args: Any) -> int:
        """Tokens of a request's prompt, for a thread that waits for nothing else.

        Raises:
            Refused: its model is not loaded, or the prompt cannot be turned into tokens.
        """
        provider = self.model_provider
        args.model.model = provider.served[args.model.model]
        if not provider.is_loaded(args.model.model):
            message = "the model is not loaded now; send a message, then count"
            raise Refused(503, message, "not_loaded", "model")
        try:
            with self._turn(tokenizer := provider.tokenizer, request):
                return len(self._prompt(tokenizer, request, args)[0])
        except BadRequestError as e:
            raise Refused(400, str(e), "invalid_request", e.param) from e

    def _hold_to_shape(self, args: Any, tokenizer: Any, prompt: list[int]) -> None:
        """Let only those tokens through that keep the reply to the shape that was asked for."""
        shape: Shape | None = getattr(args, "shape", None)
        if shape is None:
            return
        if self.model_provider.draft_model is not None:
            raise BadRequestError(f"{shape.param} does not work with --draft-model", shape.param)
        try:
            vocabulary = self.model_provider.vocabulary
            args.constraint = Constraint(vocabulary, shape, prompt)
        except ShapeError as e:
            raise BadRequestError(f"{e.param} {e}", e.param) from e
        except StreamError as e:
            raise BadRequestError(f"{shape.param}: {e}", shape.param) from e

    def _try_out(self, args: Any, tokenizer: Any) -> None:
        """Build and call this request's sampler and logits processors once, outside the batch.

        mlx-lm builds them within a batch, where a failure ends every request of it.

        Raises:
            BadRequestError: names what does not work.
        """
        count = self.model_provider.known_tokens
        for token in args.logits.logit_bias or ():
            if not 0 <= token < count:
                raise BadRequestError(
                    f"logit_bias names token {token}; tokens are 0 to {count - 1}", "logit_bias"
                )
        for name, value in (("top_k", args.sampling.top_k), ("top_logprobs", args.top_logprobs)):
            if value >= count:
                raise BadRequestError(f"{name} must be below {count}, the number of tokens", name)
        logits = mx.zeros((1, self.admission.vocabulary))
        try:
            for processor in stock._make_logits_processors(args):
                logits = processor(mx.zeros(1, mx.int32), logits)
            stock._make_sampler(args, tokenizer)(logits)
            self._make_state_machine(self.model_provider.model_key, tokenizer, args.stop_words)
        except Exception as e:
            restore_random_state()
            raise BadRequestError(f"these sampling parameters do not work: {e}") from e

    def _serve_single(self, request: Any, *rest: Any) -> None:
        reply, asked, args = request
        client = self._clients.get(id(asked))
        single = _SingleReply(reply, client, self.admission)
        expert_stream = self.model_provider.expert_stream
        if expert_stream is not None and expert_stream.lossy is not None:
            expert_stream.lossy.use_level(lowest([client]))
        with self.audience.waiting([client]):
            super()._serve_single((single, asked, args), *rest)
        restore_random_state()


def check_length(tokens: int, most: int | None, param: str) -> None:
    """Refuse a prompt that leaves no room for a reply.

    Args:
        tokens: of the prompt.
        most: tokens of prompt and reply for which there is memory; None if nothing bounds them.
        param: the request's field that has the prompt.

    Raises:
        BadRequestError: says what would do.
    """
    if most is not None and tokens >= most:
        raise BadRequestError(
            f"the prompt has {tokens} tokens, but this server has memory for {most} tokens of "
            "prompt and reply; shorten it, or start the server with --context-tokens "
            f"{enough(tokens)} (and a larger --memory, if it then says that this is too small)",
            param,
        )


def _param(request: Any) -> str:
    """The field that has the prompt."""
    return "messages" if request.request_type == "chat" else "prompt"


def _runs_beside_others(tokenizer: Any) -> bool:
    """Whether threads may use it at once: not if it is Python."""
    return bool(getattr(tokenizer, "is_fast", False))


def _characters(request: Any) -> int:
    """Length of the prompt's text, tools included, or of its list of tokens."""
    if request.request_type != "chat":
        return len(request.prompt)
    return sum(len(str(part)) for part in (request.messages, request.tools))


class _Reply:
    """The reply queue of a request; its client sees how far the prompt is."""

    def __init__(self, reply: Queue[Any], client: Client) -> None:
        self._reply, self._client = reply, client

    def put(self, item: Any) -> None:
        if isinstance(item, stock.GenerationContext):
            self._client.begin(item)
        elif isinstance(item, tuple):
            self._client.prompt = item
        else:
            self._client.prompt = None
        self._reply.put(ClientGone() if isinstance(item, PassStoppedError) else item)


class _SingleReply:
    """The reply queue of a request served alone: ends its prompt once the client has left."""

    def __init__(self, reply: Queue[Any], client: Client | None, admission: KVAdmission) -> None:
        self._reply, self._client, self._admission = reply, client, admission

    def put(self, item: Any) -> None:
        if item is None:
            self._admission.withdraw()  # its KV cache goes to the prompt cache now
        if isinstance(item, tuple) and self._client is not None and self._client.gone():
            raise ClientGone  # before the next chunk
        self._reply.put(item)


class Client:
    """One connection's view of the generation thread; mlx-lm's handler uses it in its place.

    Attributes:
        ended: nobody waits for the reply any more.
        context: mlx-lm's `GenerationContext` of the reply; None before there is one.
        prompt: tokens of the prompt that were done after its last pass, and in all; None before
            and after.
        began: when the prompt began, and the bytes read until then.
        keep_alive: called about once a second while the client waits for a token.
        lossy: the level that the request asked for; None for the server's.
        first_token: seconds from the request to its first token; None before.
    """

    lossy: int | None = None
    first_token: float | None = None
    _dropping = threading.Lock()

    def __init__(self, generator: GenerationThread, connection: socket.socket) -> None:
        self.generator, self._connection = generator, connection
        self.ended = False
        self.context: Any = None
        self.prompt: tuple[int, int] | None = None
        self.began = 0.0, 0
        self.keep_alive: Callable[[Progress | None], None] | None = None
        self._tokens: tuple[Any, Any] | None = None  # the tokenizer, and what it made of the prompt

    def give_tokens(self, tokenizer: Any, result: Any) -> None:
        """Keep what mlx-lm's `_tokenize` returns for the generation thread."""
        self._tokens = tokenizer, result

    def take_tokens(self, tokenizer: Any) -> Any:
        """What was kept, once; None if nothing was, or another model's tokenizer made it."""
        kept, self._tokens = self._tokens, None
        return kept[1] if kept is not None and kept[0] is tokenizer else None

    def begin(self, context: Any) -> None:
        """The prompt is taken."""
        follower = self.generator.model_provider.follower
        self.context = context
        self.prompt = 0, len(context.prompt) - max(0, context.prompt_cache_count)
        read = 0 if follower is None else follower.now().read_bytes
        self.began = time.perf_counter(), read

    @property
    def cli_args(self) -> argparse.Namespace:
        return self.generator.cli_args

    @property
    def is_healthy(self) -> bool:
        return self.generator.is_healthy

    def gone(self) -> bool:
        """Whether the client has closed its connection or the server is stopping."""
        if self.ended or self.generator.stopping:
            return True
        try:
            poll = select.poll()  # `select.select` knows no descriptors above 1024
            poll.register(self._connection, select.POLLIN)
            if not poll.poll(0):
                return False
            # A connection is for one request. What comes after it would hide the end, so it is
            # dropped; two threads for one connection must not wait for the same bytes.
            with self._dropping:
                return bool(poll.poll(0)) and not self._connection.recv(_DROPPED)
        except (OSError, ValueError):
            return True

    def generate(self, request: Any, args: Any, progress_callback: Any = None) -> NoReturn:
        """Called by mlx-lm's handler, whose part ends here.

        Raises:
            Asked: with the arguments.
        """
        raise Asked(args)

    def start(self, request: Any, args: Any) -> tuple[Any, Iterator[Any]]:
        """Queue a request and wait until its prompt is taken.

        Returns:
            mlx-lm's `GenerationContext`, and its responses, one per token; these raise `ClientGone`
            once nobody waits for them.

        Raises:
            Refused: the request cannot be answered.
        """
        start = time.perf_counter()

        def progress(done: int, total: int) -> None:
            if self.gone():
                raise ClientGone
            if done >= 0:
                logging.debug(f"Prompt processing progress: {done}/{total}")
            if self.keep_alive is not None:
                self.keep_alive(self.generator.progress(self))

        # Always the same name for a model: mlx-lm's batches take requests of one name only.
        args.model.model = self.generator.model_provider.served[args.model.model]
        args.model.draft = "default_model"
        self.generator.register(request, self)
        try:
            self.generator.tokenize_ahead(request, args, self)
            context, responses = self.generator.generate(request, args, progress)
        except ClientGone as e:
            if self.generator.stopping:
                raise
            raise Refused(499, "the client has left") from e
        except BadRequestError as e:
            raise Refused(400, str(e), "invalid_request", e.param) from e
        except Exception as e:
            if self.generator.stopping:  # it came when the thread had ended
                raise ClientGone from e
            raise generation_failed(e) from e
        return context, self._counted(context, responses, start)

    def _counted(self, context: Any, responses: Iterator[Any], start: float) -> Iterator[Any]:
        """The responses, counted, until the client leaves."""
        counters, first = self.generator.counters, True
        for response in responses:
            if first:
                seconds = time.perf_counter() - start
                counters.prompt(len(context.prompt), max(0, context.prompt_cache_count), seconds)
                self.first_token, first = seconds, False
            counters.token()
            if self.gone():
                raise ClientGone
            yield response


def restore_random_state() -> None:
    """Reseed MLX's random numbers if a failed step has left them unusable."""
    try:
        mx.eval(mx.random.state)
    except RuntimeError:
        mx.random.seed(time.time_ns())


def logits_processors(args: Any, make: Callable[[Any], Any]) -> list[Any]:
    """A request's logits processors: mlx-lm's, and the one that holds its reply to a shape.

    Args:
        args: mlx-lm's `GenerationArguments`.
        make: mlx-lm's function for them.
    """
    constraint: Constraint | None = getattr(args, "constraint", None)
    made = list(make(args) or ())
    return made if constraint is None else [*made, constraint.processor()]


def top_logprobs(logprobs: mx.array, count: int, tokenizer: Any) -> tuple[dict[str, Any], ...]:
    """The likeliest tokens, best first, as far as they are possible; mlx-lm's have no order.

    Args:
        logprobs: of all tokens, [V].
        count: number of tokens to return; none if below 1.
        tokenizer: unused; tokens get their text later.

    Returns:
        `id` and `logprob` of each.
    """
    if count < 1:
        return ()
    indices = mx.argpartition(-logprobs, kth=count - 1)[:count]
    ids: Any = indices.tolist()
    values: Any = logprobs[indices].tolist()
    found = sorted(zip(ids, values, strict=True), key=lambda f: (-f[1], f[0]))
    found = [f for f in found if f[1] > -mx.inf]  # JSON has no infinity
    return tuple({"id": i, "logprob": value} for i, value in found)
