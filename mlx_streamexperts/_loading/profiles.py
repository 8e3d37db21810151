"""Profiles: settings that tuning found to be fastest for one model, on one machine, in one budget.

A profile is used where everything that it was measured on is as it was then, and never changes what
was stated. Only options that no result depends on (`config.TUNED`, and the part of the budget that
the expert cache takes) can come from one. It must never be in the way of a load: one that does not
fit is left alone, with a warning that says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform as host
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from .._cache.expert_map import fewest_slots
from .._config import TUNED, StreamConfig, parse_size
from .._distributed.ranks import libraries
from .._errors import CheckpointError, StreamError
from .._experts.hot_set import identity
from .._experts.layer import ExpertLayer
from .._experts.stream import expert_files, unwritten
from .._io.checkpoint import read_json_object
from .._io.files import direct_works
from .._io.output import write_json
from .._memory.budget import Plan
from .._osinfo import config_folder, total_memory_bytes

CACHE_SHARE = "cache_share"
"""A profile's setting for the part of what a budget leaves that the expert cache takes, 0 to 1."""

_FOLDER_VARIABLE = "STREAMEXPERTS_PROFILES"
_FORMAT = 1


@dataclass(frozen=True)
class Profile:
    """A profile in use.

    Attributes:
        file: where it is.
        settings: what it sets, but for what was stated otherwise.
        gain: tokens/s that tuning measured with all of it, over those of the defaults.
    """

    file: Path
    settings: dict[str, Any]
    gain: float

    def __str__(self) -> str:
        what = ", ".join(f"{k} {v}" for k, v in self.settings.items())
        return f"{self.file.name}: {what or 'everything was stated otherwise'}"


@dataclass(frozen=True)
class Place:
    """What a profile is for, and must find again: any difference makes it stale or foreign.

    Attributes:
        checkpoint: digest of the experts, as hot sets have it.
        experts_in: the folders that experts are read from: another drive, another optimum.
        budget: bytes of `memory` and `cache` as stated, None where they were not.
        machine: of hardware and system, what decides speed.
        libraries: versions.
    """

    checkpoint: str
    experts_in: list[str]
    budget: dict[str, int | None]
    machine: dict[str, Any]
    libraries: dict[str, str] = field(default_factory=libraries)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """In what a profile that was read differs from this, as text for people."""
        found = []
        for f in fields(self):
            mine, theirs = getattr(self, f.name), other.get(f.name)
            if isinstance(mine, dict) and isinstance(theirs, dict):
                for key in sorted({*mine, *theirs}):
                    if mine.get(key) != theirs.get(key):
                        found.append(f"{f.name} {key}: {theirs.get(key)}, here {mine.get(key)}")
            elif mine != theirs:
                found.append(f"{f.name}: {theirs}, here {mine}")
        return found


def place_of(layers: Sequence[ExpertLayer], config: StreamConfig) -> Place:
    """Where we are.

    Raises:
        CheckpointError: a file of experts cannot be read.
    """
    return Place(
        checkpoint=identity(layers),
        experts_in=sorted({str(Path(f).resolve().parent) for f in expert_files(layers)}),
        budget={
            name: None if (size := getattr(config, name)) is None else parse_size(size)
            for name in ("memory", "cache")
        },
        machine=machine_facts(),
    )


def machine_facts() -> dict[str, Any]:
    """Of hardware and system, what decides speed; nothing that names a person or a host."""
    device = mx.default_device()
    info = mx.device_info() if device == mx.gpu else {}
    return {
        "system": host.system(),
        "processor": host.machine(),
        "cores": os.cpu_count(),
        "memory": total_memory_bytes(),
        "device": str(info.get("device_name") or device),
    }


def profile_folder() -> Path:
    """The user's folder of profiles; `STREAMEXPERTS_PROFILES` names another one."""
    if stated := os.environ.get(_FOLDER_VARIABLE):
        return Path(stated)
    return config_folder() / "mlx-streamexperts" / "profiles"


def default_file(place: Place, model: str) -> Path:
    """Where the profile for a place is saved unless something else is said."""
    key = json.dumps([place.checkpoint, place.experts_in, place.budget, place.machine])
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    return profile_folder() / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', model)[:80]}-{digest}.json"


def write_profile(
    file: Path, place: Place, model: str, settings: dict[str, Any], measured: dict[str, Any]
) -> None:
    """Save a profile.

    Args:
        file: is replaced if it is there.
        place: what it is for.
        model: its name, for people.
        settings: of options in `TUNED`, and `CACHE_SHARE`.
        measured: how it was found; `gain` is asked for again.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        file,
        {
            "format": _FORMAT,
            "model": model,
            "settings": settings,
            "measured": measured,
            **{f.name: getattr(place, f.name) for f in fields(place)},
        },
    )


def with_profile(
    layers: Sequence[ExpertLayer], config: StreamConfig, plan: Plan
) -> tuple[StreamConfig, Profile | None]:
    """The options with those of a profile where nothing was stated, and the profile, if one fits.

    Warns of one that does not fit.

    Args:
        layers: of the model that is about to be loaded.
        config: as stated.
        plan: what that comes to.

    Raises:
        StreamError: `profile` names a file that is not there.
    """
    if config.profile == "off" or unwritten(layers):
        return config, None
    stated = config.profile != "auto"
    candidates = [Path(config.profile)] if stated else _saved()
    if stated and not candidates[0].is_file():
        raise StreamError(
            f"profile={config.profile!r}: no such file; say auto or off, or make one with "
            "python -m mlx_streamexperts.tune"
        )
    if not candidates:
        return config, None
    place = place_of(layers, config)
    unfit: list[tuple[Path, list[str]]] = []
    for file in candidates:
        try:
            content = read_json_object(file, "a profile")
            settings, gain = _settings(content)
        except StreamError as e:
            if stated:
                _warn(file, [str(e)])
            continue
        differences = place.differences(content)
        if not differences:
            return _applied(layers, config, plan, Profile(file, settings, gain))
        if stated or content.get("checkpoint") == place.checkpoint:
            unfit.append((file, differences))
    if unfit:  # the nearest tells most
        _warn(*min(unfit, key=lambda found: len(found[1])))
    return config, None


def _saved() -> list[Path]:
    try:
        return sorted(profile_folder().glob("*.json"))
    except OSError:  # may not be looked at
        return []


def _warn(file: Path, why: list[str]) -> None:
    warnings.warn(
        f"the profile {file} is not used: {'; '.join(why)}. Tune again, or load with profile='off' "
        "(--no-profile)",
        stacklevel=2,
    )


def _applied(
    layers: Sequence[ExpertLayer], config: StreamConfig, plan: Plan, profile: Profile
) -> tuple[StreamConfig, Profile]:
    """A fitting profile's settings, where nothing was stated."""
    changes = {k: v for k, v in profile.settings.items() if k in TUNED and not config.stated(k)}
    if changes.get("bypass_page_cache") == "on" and not _bypassable(layers):
        del changes["bypass_page_cache"]
    used = dict(changes)
    share = profile.settings.get(CACHE_SHARE, 1.0)
    if share < 1 and config.cache is None:
        used[CACHE_SHARE] = share
        changes |= shared(layers, plan, share)
    return replace(config, **changes), replace(profile, settings=used)


def shared(layers: Sequence[ExpertLayer], plan: Plan, share: float) -> dict[str, int | None]:
    """The options that give the expert cache a part of what a plan leaves it, never too little."""
    fewest = sum(min(fewest_slots(plan.top_k), x.experts) * x.expert_bytes for x in layers)
    return {"cache": max(fewest, int(share * plan.cache)), "memory": plan.memory}


def _bypassable(layers: Sequence[ExpertLayer]) -> bool:
    return direct_works(Path(next(iter(layers[0].tensors.values())).stored.files[0]))


def _settings(content: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """A profile's settings and gain.

    Raises:
        StreamError: it is not one that this version reads.
    """
    settings, measured = content.get("settings"), content.get("measured")
    if content.get("format") != _FORMAT or not isinstance(settings, dict):
        raise CheckpointError("not a profile that this version reads")
    for name, value in settings.items():
        if name == CACHE_SHARE:
            good = isinstance(value, (int, float)) and 0 < value <= 1
        else:
            default = getattr(StreamConfig(), name) if name in TUNED else None
            kind = int if isinstance(default, int) else str
            good = name in TUNED and type(value) is kind
        if not good:
            raise CheckpointError(f"{name}={value!r} is no setting that a profile can have")
    replace(StreamConfig(), **{k: v for k, v in settings.items() if k in TUNED})
    gain = measured.get("gain") if isinstance(measured, dict) else None
    return settings, float(gain) if isinstance(gain, (int, float)) else 1.0
