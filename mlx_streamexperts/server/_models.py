"""The models that a server may load: only those named at its start, one at a time."""

from __future__ import annotations

import argparse
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import server as stock
from mlx_lm.models.cache import make_prompt_cache

from .._experts.follower import Follower
from .._experts.lossy import last_line
from .._experts.stream import ExpertStream, is_streamed, stream
from .._loading.combinations import batches
from .._memory.process_memory import unregister
from .._prefixes.remembered import PrefixCache
from .._structured.constraint import Vocabulary
from ._kv_admission import KVAdmission
from ._refusals import Refused


@dataclass(frozen=True)
class Loaded:
    """What the threads of connections may know of the loaded model, all of one moment.

    Attributes:
        path: its folder.
        tokenizer: mlx-lm's.
        most_tokens: of prompt and reply; None if nothing bounds them.
    """

    path: str
    tokenizer: Any
    most_tokens: int | None


class ModelProvider(stock.ModelProvider):
    """mlx-lm's provider, for models that were named at the start and no others.

    Args:
        args: the parsed command line. The provider keeps a copy: `cli_args.prefill_step_size`,
            which mlx-lm reads for each batch, belongs to it and follows the loaded model's plan.
        served: folder by the name that `/v1/models` lists; the first is the default.
        aliases: further names of these folders.
        admission: gets the plan of each loaded model.

    Attributes:
        served: folder by every name that a request may use.
        listed: the names that `/v1/models` lists.
        known_tokens: number of tokens that both the model and its tokenizer know.
        loaded: for other threads than the one that loads; None while no model is loaded.
        follower: tells how far the loaded model's pass is; None if no streamed model is loaded.
        prefixes: the loaded model's prompts on the drive; None without `--prefix-cache`.
        should_stop: asked while passes run: shall the pass under way end?
        forget_prompts: called before a model is freed: lets go of the KV caches of its prompts.
    """

    model: Any
    tokenizer: Any
    known_tokens = 1
    loaded: Loaded | None = None
    follower: Follower | None = None
    should_stop: Callable[[], bool] | None = None
    forget_prompts: Callable[[], None] | None = None
    prefixes: PrefixCache | None = None
    _vocabulary: Vocabulary | None = None

    def __init__(
        self,
        args: argparse.Namespace,
        served: dict[str, str],
        aliases: dict[str, str],
        admission: KVAdmission,
    ) -> None:
        self._last: Any = None  # the model that was loaded last
        super().__init__(argparse.Namespace(**vars(args)))
        self._stated_step = args.prefill_step_size  # None: as each model's plan says
        self.admission, self.listed = admission, list(served)
        default = next(iter(served.values()))
        paths = {
            name: path for path in served.values() for name in (path, str(Path(path).resolve()))
        }
        self.served = {**served, **paths, **aliases, "default_model": default}
        for name, path in self.served.items():
            self._model_map[name] = path
            if path == default:  # by whichever name: the same adapter, so the same model
                self._adapter_map[name] = args.adapter_path

    @property
    def expert_stream(self) -> ExpertStream | None:
        """The loaded model's stream; None if no streamed model is loaded."""
        model = self.model
        return stream(model) if model is not None and is_streamed(model) else None

    @property
    def vocabulary(self) -> Vocabulary:
        """The loaded model's tokens for replies in a shape. Only the generation thread may ask.

        Raises:
            StreamError: there is no library for such replies, or not for this tokenizer.
        """
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.tokenizer)
        return self._vocabulary

    def check(self, model: str, adapter: str | None, draft: str | None) -> None:
        """Refuse to load anything that was not named at the start.

        Raises:
            Refused: tells what is served instead.
        """
        if model not in self.served:
            raise Refused(
                404,
                f"this server has no model {model!r}, only: {', '.join(self.listed)} "
                "(--also-serve adds models)",
                "model_not_found",
            )
        if adapter not in (None, self.cli_args.adapter_path):
            raise Refused(
                400, "adapters cannot be chosen by a request, only by the server's --adapter-path"
            )
        if draft not in ("default_model", self.cli_args.draft_model):
            raise Refused(
                400, "draft_model cannot be chosen by a request, only by the server's --draft-model"
            )

    def is_loaded(self, model: str) -> bool:
        """Whether this name means the loaded model."""
        return self.model_key is not None and self.model_key[0] == self._model_map[model]

    def _load(self, *args: Any, **options: Any) -> None:
        self.unload()
        super()._load(*args, **options)
        self._last = self.model
        self.is_batchable = self.is_batchable and batches(self.model, make_prompt_cache(self.model))
        if (expert_stream := self.expert_stream) is not None:
            plan = expert_stream.plan
            rows = expert_stream.token_rows or len(self.tokenizer)
            self.known_tokens = min(rows, len(self.tokenizer))  # either may know more
            self.admission.open(plan, rows)
            if (folder := self.cli_args.prefix_cache) is not None:
                cli, adapter = self.cli_args, args[1] if args[1:] else None
                self.prefixes = PrefixCache(
                    self.model, folder, cli.prefix_bytes, adapter,
                    cli.kv_bits, cli.kv_group_size, cli.quantized_kv_start,
                )  # fmt: skip
                self.admission.computed = self.prefixes.computed
            self.follower = expert_stream.follow(stop=self.should_stop)
            self.cli_args.prefill_step_size = self._stated_step or plan.prefill_tokens
            logging.info(f"Loaded {args[0]}: {plan}")
        if getattr(self.tokenizer, "is_fast", False):
            self.tokenizer.encode("")  # drops a truncation that its file states; later calls read
        most = self.admission.reply_limit(0)
        assert self.model_key is not None
        self.loaded = Loaded(self.model_key[0], self.tokenizer, most)

    def unload(self) -> None:
        """Free the loaded model and its prompts, even if something still refers to the model.

        mlx-lm's generation loop does: the next model would be loaded beside this one's trunk.
        """
        model, self._last = self._last, None  # mlx-lm forgets it first when its loop ends
        self.loaded = None
        if self.forget_prompts is not None:  # no other model can use them
            self.forget_prompts()
        self.reset()
        self.admission.close()
        self.prefixes = self._vocabulary = None
        if self.follower is not None:
            self.follower.close()
            self.follower = None
        if model is not None and is_streamed(model):
            expert_stream = stream(model)
            if expert_stream.lossy is not None:
                logging.warning(f"Lossy: {last_line(expert_stream.lossy)}")
            expert_stream.close()
            for module in model.modules():
                module.clear()
            unregister(expert_stream)  # its memory no longer counts, whoever refers to it
            del expert_stream
        del model
        gc.collect()
        mx.clear_cache()
