"""Which settings to try next: each value alone, then what Optuna makes of the answers.

Optuna is imported only here (extra `tune`), and only when a search begins.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .._errors import StreamError

Settings = dict[str, Any]
Space = dict[str, Sequence[Any]]

_STEPS = 200  # of a walk to settings that were not tried, before all are looked through


def key(settings: Settings) -> str:
    """The same for the same settings."""
    return json.dumps(settings, sort_keys=True)


class Search:
    """A study of Optuna's over some settings, aiming at the highest ratio to the defaults.

    Args:
        space: the values of each setting; the first one is the default.
        changed: leaves of settings those that differ from the defaults and matter.
        known: ratios of settings that were tried, None where they failed or must not be used.
        seed: of its random numbers.

    Raises:
        StreamError: Optuna is not installed.
    """

    def __init__(
        self,
        space: Space,
        changed: Callable[[Settings], Settings],
        known: Iterable[tuple[Settings, float | None]],
        seed: int,
    ) -> None:
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._changed = space, changed
        self._failed = optuna.trial.TrialState.FAIL
        self._study = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed)
        )
        self._random = random.Random(seed)
        self._tried = {key({})}
        self._trial: Any = None
        defaults = {k: v[0] for k, v in space.items()}
        kinds = {k: optuna.distributions.CategoricalDistribution(list(v)) for k, v in space.items()}
        for settings, ratio in [({}, 1.0), *known]:
            self._tried.add(key(settings))
            params = {**defaults, **settings}
            if ratio and all(v in space.get(k, ()) for k, v in params.items()):
                self._study.add_trial(
                    optuna.trial.create_trial(
                        params=params, distributions=kinds, value=math.log(ratio)
                    )
                )
        for name, values in space.items():
            for value in values[1:]:
                if key(changed({**defaults, name: value})) in self._tried:
                    continue
                self._study.enqueue_trial({**defaults, name: value})

    def ask(self) -> Settings | None:
        """Settings that were not tried yet; None where there are none.

        Optuna soon proposes what it knows to be good again and again. A random walk from there
        finds what is near and new.
        """
        trial, params = self._asked()
        for _ in range(_STEPS):
            if key(self._changed(params)) not in self._tried:
                break
            name = self._random.choice(list(self._space))
            params = {**params, name: self._random.choice(list(self._space[name]))}
        else:
            everything = itertools.product(*self._space.values())
            for values in everything:
                params = dict(zip(self._space, values, strict=True))
                if key(self._changed(params)) not in self._tried:
                    break
            else:
                return None
        if params != trial.params:
            self._study.tell(trial, state=self._failed)
            self._study.enqueue_trial(params)
            trial, params = self._asked()
        settings = self._changed(params)
        self._tried.add(key(settings))
        self._trial = trial
        return settings

    def _asked(self) -> tuple[Any, Settings]:
        """What Optuna proposes, or what it was told to."""
        trial = self._study.ask()
        return trial, {k: trial.suggest_categorical(k, list(v)) for k, v in self._space.items()}

    def tell(self, ratio: float | None) -> None:
        """What came of the settings that were asked for last; None if they failed."""
        if ratio is None:
            self._study.tell(self._trial, state=self._failed)
        else:
            self._study.tell(self._trial, math.log(ratio))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as e:
        raise StreamError(
            "tuning needs the optuna library: pip install 'mlx-streamexperts[tune]'"
        ) from e
    return optuna
