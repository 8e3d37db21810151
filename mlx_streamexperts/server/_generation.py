"""mlx-lm's server behind the web: which models it serves, and the thread that generates.

Adds to mlx-lm's own what a promise needs: only models that were named at the start are loaded, one
at a time and the next after the last is gone; requests wait for room; one that fails, or whose
client left, costs the others nothing; the stream is closed at the end.
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
from pathlib import Path
from queue import Queue
from typing import Any, NoReturn

import mlx.core as mx
from mlx_lm import server as stock
from mlx_lm.models.cache import make_prompt_cache

from .._errors import StreamError
from .._experts.stream import ExpertStream, is_streamed, stream
from .._loading.combinations import batches
from .._memory.process_memory import unregister
from ._kv_admission import Room
from ._traffic import Traffic


class Refused(BaseException):
    """Ends a request with an error reply. Not an `Exception`: mlx-lm's handlers catch those.

    Attributes:
        status: of HTTP.
        message: what was wrong and what to do.
        code: short name of it, as OpenAI's API has them.
        param: the field that it is about, if it is about one.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


class Begun(BaseException):
    """Takes what the generator responds out of mlx-lm's handler, which would lose some of it.

    Attributes:
        context: mlx-lm's, of the request.
        responses: one a token.
        asked: what the request asks for, as mlx-lm has it.
    """

    def __init__(self, context: Any, responses: Iterator[Any], asked: Any) -> None:
        self.context, self.responses, self.asked = context, responses, asked


class ClientGone(ConnectionError):  # noqa: N818, it is no error of ours
    """The client has closed its connection."""


class BadRequestError(StreamError):
    """The request cannot be answered, whoever asks again.

    Attributes:
        param: the field that it is about, if it is about one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Provider(stock.ModelProvider):
    """Loads the models that were named at the start, and no others.

    Args:
        args: the parsed command line.
        served: folder by name; the first one is the default.

    Attributes:
        room: what the loaded model's plan has room for.
        words: tokens that its tokenizer and the model know.
        served: folder by name that requests may use, paths and the default's nicknames included.
    """

    model: Any
    tokenizer: Any
    words = 1

    def __init__(self, args: argparse.Namespace, served: dict[str, str], room: Room) -> None:
        self._last: Any = None  # the model that was loaded last
        super().__init__(args)
        self.room, self.listed = room, list(served)
        default = next(iter(served))
        self.served = {**served, **{path: path for path in served.values()}}
        self.served |= {str(Path(path).resolve()): path for path in served.values()}
        self.served |= dict(zip(args.given, served.values(), strict=True))
        self.served["default_model"] = served[default]
        for name, path in self.served.items():
            self._model_map[name] = path
            if path == served[default]:  # by whichever name: the same adapter, so the same model
                self._adapter_map[name] = args.adapter_path

    @property
    def expert_stream(self) -> ExpertStream | None:
        """Of the model that is loaded."""
        model = self.model
        return stream(model) if model is not None and is_streamed(model) else None

    def check(self, model: str, adapter: str | None, draft: str | None) -> None:
        """Refuse what would load something that was not named at the start.

        Raises:
            Refused: with what is served instead.
        """
        if model not in self.served:
            raise Refused(
                404,
                f"this server does not serve {model!r}, only: {', '.join(self.listed)} "
                "(--also-serve adds models)",
                "model_not_found",
            )
        if adapter not in (None, self.cli_args.adapter_path):
            raise Refused(400, "adapters: the server's own are used (--adapter-path)")
        if draft not in ("default_model", self.cli_args.draft_model):
            raise Refused(400, "draft_model: the server's own is used (--draft-model)")

    def is_loaded(self, model: str) -> bool:
        """Is it the one that is loaded, by whichever name?"""
        return self.model_key is not None and self.model_key[0] == self._model_map[model]

    def _load(self, *args: Any, **options: Any) -> None:
        stated = getattr(self.cli_args, "stated_step", None)
        self.unload()
        super()._load(*args, **options)
        self._last = self.model
        self.is_batchable = self.is_batchable and batches(self.model, make_prompt_cache(self.model))
        if (expert_stream := self.expert_stream) is not None:
            rows = expert_stream.token_rows or len(self.tokenizer)
            self.words = min(rows, len(self.tokenizer))  # either may know more than the other
            self.room.open(expert_stream.plan, rows)
            self.cli_args.prefill_step_size = stated or expert_stream.plan.prefill_tokens
            logging.info(f"Loaded {args[0]}: {expert_stream.plan}")

    def unload(self) -> None:
        """Free all of the model that is loaded, whoever still refers to it.

        mlx-lm's generation loop does: the next model would be loaded beside this one's trunk.
        """
        model, self._last = self._last, None  # mlx-lm forgets it first when its loop ends
        self.reset()
        self.room.plan = None
        if model is not None and is_streamed(model):
            expert_stream = stream(model)
            expert_stream.close()
            for module in model.modules():
                module.clear()
            unregister(expert_stream)  # nothing of it is left, whoever refers to the model
            del expert_stream
        del model
        gc.collect()
        mx.clear_cache()


class Generator(stock.ResponseGenerator):
    """The generation thread.

    Attributes:
        ready: set once the default model is loaded, or was found not to load.
        failure: why it did not.
        stopping: the server is being stopped; requests under way end at their next token.
    """

    model_provider: Provider

    def __init__(self, provider: Provider, prompt_cache: Any, traffic: Traffic) -> None:
        self.traffic, self.room = traffic, provider.room
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self.stopping = False
        self._held: Any = None  # a request that waits for room
        self._clients: dict[int, Client] = {}  # by id of the request
        self._replies: dict[Any, Client] = {}  # of requests under way, by their queue
        self._tokenized: dict[int, Any] = {}  # by id of the request
        self.room.keep = self._keep
        super().__init__(provider, prompt_cache)

    def _keep(self, tokens: list[int], caches: list[Any]) -> None:
        """Keep what was computed for a reply that its reader has ended."""
        self.prompt_cache.insert_cache(
            self.model_provider.model_key, tokens, caches, cache_type="assistant"
        )

    def expect(self, request: Any, client: Client) -> None:
        """`client` is about to ask for `request`."""
        self._clients[id(request)] = client

    def forget(self, request: Any) -> None:
        """The request is over."""
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
                except Exception as e:
                    logging.exception("a batch failed, its requests with it")
                    self._fail(e.with_traceback(None))  # whose frames hold the batch
        finally:
            self.model_provider.unload()
            mx.clear_streams()  # with a stream of an ended thread left, MLX aborts at exit

    def _fail(self, error: Exception) -> None:
        """Tell everybody whose request was under way; the next one begins anew."""
        for reply in self._replies:
            reply.put(error)
        self._replies.clear()
        self.room.active.clear()
        sound_random_state()
        gc.collect()
        mx.clear_cache()

    def _next_request(self, timeout: float | None = None) -> Any:
        self.room.pending = 0
        if self._is_distributed:  # every rank must decide the same, and only one knows the clients
            return super()._next_request(timeout)
        item, self._held = self._held, None
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
            if self.room.active:  # first those of the model that is loaded
                self._held = item
                return None
            tokens = 0  # unknown before its tokenizer is loaded; nothing else is running
        else:
            try:
                tokens = self._tokens(request, args)
            except Exception as e:
                reply.put(e)
                return None
            if not self.room.admits(tokens):
                self._held = item
                return None
        self.room.pending = tokens
        self._replies[reply] = client
        return item

    def _tokens(self, request: Any, args: Any) -> int:
        """Tokens of prompt and reply. Tokenizes once; what mlx-lm asks for later is this."""
        tokenizer = self.model_provider.tokenizer
        if id(request) not in self._tokenized:
            self._tokenized = {id(request): (request, self._tokenize(tokenizer, request, args))}
        return len(self._tokenized[id(request)][1][0]) + args.max_tokens

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        known = self._tokenized.pop(id(request), None)
        if known is not None and known[0] is request:
            return known[1]
        try:
            result = super()._tokenize(tokenizer, request, args)
        except Exception as e:  # a template's error, a role it does not know
            raise BadRequestError(f"the prompt cannot be made into tokens: {e}") from e
        param = "messages" if request.request_type == "chat" else "prompt"
        if not result[0]:
            raise BadRequestError("the prompt is empty", param)
        words = self.model_provider.words
        if (token := max(result[0])) >= words:
            raise BadRequestError(
                f"the prompt has token {token}; the model knows only {words}, its tokenizer more",
                param,
            )
        longest = self.room.longest_reply(len(result[0]))
        if longest is not None:
            if longest < 1:
                raise BadRequestError(
                    f"the prompt has {len(result[0])} tokens; this server has memory for "
                    f"{len(result[0]) + longest} of prompt and reply (--context-tokens)",
                    param,
                )
            args.max_tokens = min(args.max_tokens, longest)
        self._try(args, tokenizer)
        return result

    def _try(self, args: Any, tokenizer: Any) -> None:
        """Make what this request alone needs, once for nothing: mlx-lm makes it within a batch.

        Raises:
            BadRequestError: something of it cannot be made, or does not work.
        """
        words = self.model_provider.words
        for token in args.logits.logit_bias or ():
            if not 0 <= token < words:
                raise BadRequestError(
                    f"logit_bias: there is no token {token}, only {words}", "logit_bias"
                )
        for name, value in (("top_k", args.sampling.top_k), ("top_logprobs", args.top_logprobs)):
            if value >= words:
                raise BadRequestError(f"{name} must be below {words}, the number of tokens", name)
        logits = mx.zeros((1, self.room.vocabulary))
        try:
            for processor in stock._make_logits_processors(args):
                logits = processor(mx.zeros(1, mx.int32), logits)
            stock._make_sampler(args, tokenizer)(logits)
            self._make_state_machine(self.model_provider.model_key, tokenizer, args.stop_words)
        except Exception as e:
            sound_random_state()
            raise BadRequestError(f"the sampling parameters do not work: {e}") from e

    def _serve_single(self, request: Any, *rest: Any) -> None:
        reply, asked, args = request
        client = self._clients.get(id(asked))
        super()._serve_single((_Stopping(reply, client, self.room), asked, args), *rest)
        sound_random_state()


class _Stopping:
    """The reply queue of a request that is served alone: stops its prompt when its client left."""

    def __init__(self, reply: Queue[Any], client: Client | None, room: Room) -> None:
        self._reply, self._client, self._room = reply, client, room

    def put(self, item: Any) -> None:
        if item is None:
            self._room.pending = 0  # its KV cache is the prompt cache's from here on
        if isinstance(item, tuple) and self._client is not None and self._client.gone():
            raise ClientGone
        self._reply.put(item)


class Client:
    """One connection's view of the generator: what mlx-lm's handler takes for the generator.

    Attributes:
        outcome: how its request ended, one of `traffic.OUTCOMES`.
        ended: nobody waits for its reply any more.
    """

    def __init__(self, generator: Generator, connection: socket.socket) -> None:
        self.generator, self._connection = generator, connection
        self.ended = False

    @property
    def cli_args(self) -> argparse.Namespace:
        return self.generator.cli_args

    @property
    def is_healthy(self) -> bool:
        return self.generator.is_healthy

    def gone(self) -> bool:
        """Has the client closed its connection, or is the server stopping?"""
        if self.ended or self.generator.stopping:
            return True
        try:
            poll = select.poll()  # not `select`, which knows no descriptors above 1024
            poll.register(self._connection, select.POLLIN)
            return bool(poll.poll(0)) and not self._connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def generate(
        self,
        request: Any,
        args: Any,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> NoReturn:
        """As mlx-lm's, but it ends when the client leaves, and its errors have a status.

        Raises:
            Begun: the prompt is taken; its responses raise `ClientGone` when nobody waits for them.
            Refused: the request cannot be answered.
        """
        began = time.perf_counter()

        def progress(done: int, total: int) -> None:
            if self.gone():
                raise ClientGone
            if progress_callback is not None:
                progress_callback(done, total)

        # By one name, whichever was used: mlx-lm's batches take requests of one name only.
        args.model.model = self.generator.model_provider.served[args.model.model]
        args.model.draft = "default_model"
        self.generator.expect(request, self)
        try:
            context, responses = self.generator.generate(request, args, progress)
        except ClientGone as e:
            raise Refused(499, "the client has left") from e
        except BadRequestError as e:
            raise Refused(400, str(e), "invalid_request", e.param) from e
        except Exception as e:
            raise failed(e) from e
        raise Begun(context, self._watched(context, responses, began), args)

    def _watched(self, context: Any, responses: Iterator[Any], began: float) -> Iterator[Any]:
        traffic, first = self.generator.traffic, True
        for response in responses:
            if first:
                seconds = time.perf_counter() - began
                traffic.prompt(len(context.prompt), max(0, context.prompt_cache_count), seconds)
                first = False
            traffic.token()
            if self.gone():
                raise ClientGone
            yield response


def sound_random_state() -> None:
    """Begin the random numbers anew where a failed step has left them unusable."""
    try:
        mx.eval(mx.random.state)
    except RuntimeError:
        mx.random.seed(time.time_ns())


def top_logprobs(logprobs: mx.array, count: int, tokenizer: Any) -> tuple[dict[str, Any], ...]:
    """The likeliest tokens, the first one first: mlx-lm has them in no order.

    Args:
        logprobs: of all tokens, [V].
        count: how many; none where it is below 1.
        tokenizer: not used, names come later.

    Returns:
        `id` and `logprob` of each.
    """
    if count < 1:
        return ()
    indices = mx.argpartition(-logprobs, kth=count - 1)[:count]
    ids: Any = indices.tolist()
    values: Any = logprobs[indices].tolist()
    found = sorted(zip(ids, values, strict=True), key=lambda f: (-f[1], f[0]))
    return tuple({"id": i, "logprob": value} for i, value in found)


def failed(error: Exception) -> Refused:
    """The reply to a request that failed here. Paths and traces are for the log alone."""
    if isinstance(error, StreamError):
        logging.error(str(error))
    return Refused(
        500, f"generating failed: {type(error).__name__}; the server's log says more", "failed"
    )
