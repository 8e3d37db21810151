"""Which settings to try next: each value alone, then proposals of Optuna's, none of them twice.

Only a search imports Optuna (extra `tune`).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .._errors import StreamError

Settings = dict[str, Any]
Space = dict[str, Sequence[Any]]


class Search:
    """An Optuna study over settings; it maximizes the ratio of tokens/s to the defaults'.

    Args:
        space: the values of each setting, the default first.
        changed: reduces settings to those that differ from the defaults and matter.
        known: settings that were tried and their ratios; None if they failed or are disqualified.
        seed: of its random numbers.
        together: settings that may pay only together; tried after each value alone.

    Raises:
        StreamError: Optuna is not installed.
    """

    def __init__(
        self,
        space: Space,
        changed: Callable[[Settings], Settings],
        known: Iterable[tuple[Settings, float | None]],
        seed: int,
        together: Iterable[Settings] = (),
    ) -> None:
        try:
            import optuna
        except ImportError as e:
            raise StreamError("tuning needs the optuna library: pip install 'optuna>=4,<6'") from e
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed)
        self._failed = optuna.trial.TrialState.FAIL
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._random, self._changed = random.Random(seed), changed
        self._kinds: dict[str, Any] = {
            k: optuna.distributions.CategoricalDistribution(list(v)) for k, v in space.items()
        }
        # Every combination, by the settings in it that matter.
        self._untried: dict[frozenset[tuple[str, Any]], Settings] = {}
        for chosen in itertools.product(*space.values()):
            combination = dict(zip(space, chosen, strict=True))
            self._untried.setdefault(self._key(combination), combination)
        defaults = {name: values[0] for name, values in space.items()}
        for settings, ratio in [({}, 1.0), *known]:
            self._untried.pop(self._key(settings), None)
            if ratio is not None:
                self._study.add_trial(
                    optuna.trial.create_trial(
                        params={**defaults, **settings},
                        distributions=self._kinds,
                        value=math.log(ratio),
                    )
                )
        alone = [{name: value} for name, values in space.items() for value in values[1:]]
        for settings in (*alone, *together):
            if self._key(settings) in self._untried:
                self._study.enqueue_trial({**defaults, **settings})

    def ask(self) -> Settings | None:
        """Settings that were not tried yet; None if there are none left.

        Optuna soon repeats what it knows to be good; the nearest untried settings replace that.
        """
        if not self._untried:
            return None
        self._trial = self._study.ask(self._kinds)
        proposed = self._trial.params
        if self._key(proposed) not in self._untried:
            self.tell(None)
            nearest = min(
                self._untried.values(),
                key=lambda s: (sum(s[k] != v for k, v in proposed.items()), self._random.random()),
            )
            self._study.enqueue_trial(nearest)
            self._trial = self._study.ask(self._kinds)
        del self._untried[self._key(self._trial.params)]
        return self._changed(self._trial.params)

    def tell(self, ratio: float | None) -> None:
        """Report the ratio of the settings that were asked for last; None if they failed."""
        if ratio is None:
            self._study.tell(self._trial, state=self._failed)
        else:
            self._study.tell(self._trial, math.log(ratio))

    def _key(self, settings: Settings) -> frozenset[tuple[str, Any]]:
        return frozenset(self._changed(settings).items())
