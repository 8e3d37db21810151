"""The note in a model folder whose experts have moved into a packed store.

Its shards have holes where experts were. The note says which layers those are, where the store is,
and what the shards were. It has the name of a shard and is none: any other library that loads this
folder stops there with an error that has its name, instead of taking zeros for weights. Some find
their shards through the index: meanwhile it says that the experts' tensors are in the note.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from .._errors import CheckpointError, StreamError
from .checkpoint import (
    INDEX,
    INDEX_ASIDE,
    MOVED,
    file_identity,
    header_identity,
    read_json_object,
)
from .output import sync_folder, whole, write_json

_FORMAT = 1


@dataclass
class Moved:
    """What such a note says.

    Attributes:
        folder: the model folder.
        store: the packed store's folder.
        shards: what `file_identity` said of each shard with experts when it was whole, by name.
        layers: layers whose experts are only in the store, by name, each with its number in it.
        packed_by: the library that named the layers, and its version: "mlx-lm 0.32.2". Empty in
            notes of earlier versions, and so is `id`.
        id: ties the note to the store, which has it too (`packed_store.claim`).
    """

    folder: Path
    store: Path
    shards: dict[str, Any]
    layers: dict[str, int] = field(default_factory=dict)
    packed_by: str = ""
    id: str = ""

    @property
    def loader(self) -> str | None:
        """The library that has to load this folder; None if the note does not say."""
        return self.packed_by.partition(" ")[0] or None

    @property
    def way_out(self) -> str:
        """What to do if a library describes the layers otherwise than the store has them."""
        library = (
            f"use {self.packed_by}, which packed them (--loader {self.loader})"
            if self.loader
            else "use the library that packed them (--loader mlx-lm or --loader mlx-vlm), in the "
            "version of that time"
        )
        return f"delete nothing, these experts are nowhere else: {library}"

    def identify(self, packed_by: str) -> None:
        """Write down who packed the experts, unless the note says so; earlier versions did not.

        Args:
            packed_by: the library that located the layers, and its version.
        """
        if not self.id:
            self.packed_by, self.id = packed_by, uuid4().hex

    def check_names(self, names: Iterable[str]) -> None:
        """Check that the layers that have moved are layers of the model as it is loaded now.

        Names depend on the library. Under other names all layers would seem to be in the shards,
        where there are holes.

        Args:
            names: all expert layers of the model.

        Raises:
            CheckpointError: some are not.
        """
        unknown = sorted(self.layers.keys() - set(names))
        if unknown:
            raise CheckpointError(
                f"{self.folder}: the experts of {unknown[0]} are in the packed store, and the "
                f"model has no such layer as it is loaded now: {self.way_out}"
            )

    def save(self) -> None:
        """Write the note; it survives a power failure from then on.

        The store's place is written relative to the model folder if they have one parent, or the
        store is inside, so that they can be moved together.
        """
        folder, store = self.folder.resolve(), self.store.resolve()
        near = store.is_relative_to(folder.parent)
        place = os.path.relpath(store, folder) if near else str(store)
        note = {
            "about": "The experts of this model are in a packed store; the shards have holes where "
            "they were. Load it with mlx-streamexperts. To get the shards back: "
            "python -m mlx_streamexperts.pack --unpack --model <this folder>",
            "format": _FORMAT,
            "store": place,
            "shards": self.shards,
            "layers": self.layers,
            "packed_by": self.packed_by,
            "id": self.id,
        }
        write_json(self.folder / MOVED, note)

    def divert_index(self, tensors: Iterable[str]) -> None:
        """Let the index say that tensors are in the note, and keep it as it was beside.

        Removing it instead would not do: mlx-vlm then loads every safetensors file in the folder,
        adapters among them, and does not find DeepSeek V4.1's engrams.

        Args:
            tensors: names of the stored tensors that hold experts.
        """
        index, aside = self.folder / INDEX, self.folder / INDEX_ASIDE
        if not index.exists():
            return
        try:
            content = read_json_object(index, "weight_map", dict)
            files = dict(content["weight_map"])
            shards = set(files.values())
        except (CheckpointError, KeyError, TypeError, ValueError):  # it leads nowhere
            index.replace(aside)
            sync_folder(self.folder)
            return
        if MOVED in shards:
            return
        with whole(aside) as partial, partial.open("wb") as f:
            f.write(index.read_bytes())
            f.flush()
            os.fsync(f.fileno())
        files |= dict.fromkeys(files.keys() & set(tensors), MOVED)
        # mlx-vlm loads the files that are named here: the note, and shards of experts alone too.
        for file in sorted({MOVED, *shards} - set(files.values())):
            files[f"{Path(MOVED).stem}.{file}"] = file
        write_json(index, {**content, "weight_map": files})

    def remove(self) -> None:
        """Remove the note, because all bytes are back in the shards."""
        if (self.folder / INDEX_ASIDE).exists():
            (self.folder / INDEX_ASIDE).replace(self.folder / INDEX)
        (self.folder / MOVED).unlink()
        sync_folder(self.folder)

    def identity(self, shard: Path) -> dict[str, Any]:
        """A shard's `file_identity` when it was whole."""
        known: dict[str, Any] = self.shards.get(shard.name, {})
        now = header_identity(shard)
        return known if now == {k: known.get(k) for k in now} else file_identity(shard)


def read_moved(folder: Path) -> Moved | None:
    """The note in a model folder; None if there is none.

    Raises:
        CheckpointError: it is damaged, or another version wrote it.
    """
    file = folder / MOVED
    if not file.exists():
        return None
    note = read_json_object(file, "layers")
    store, shards, layers = (note.get(k) for k in ("store", "shards", "layers"))
    packed_by, known_id = note.get("packed_by", ""), note.get("id", "")
    if (
        note.get("format") != _FORMAT
        or not isinstance(store, str)
        or not isinstance(shards, dict)
        or not all(isinstance(known, dict) for known in shards.values())
        or not isinstance(layers, dict)
        or not all(type(n) is int and 0 <= n < 100_000 for n in layers.values())
        or not isinstance(packed_by, str)
        or not isinstance(known_id, str)
    ):
        raise CheckpointError(f"{file}: not a note of format {_FORMAT} about moved experts")
    return Moved(folder, folder / store, shards, layers, packed_by, known_id)


def refuse_moved(folder: Path, doing: str) -> None:
    """Refuse a folder whose shards have holes.

    Raises:
        StreamError: its experts are in a packed store.
    """
    if (folder / MOVED).exists():
        raise StreamError(
            f"{folder}: its experts are in a packed store, and {doing} needs them in the shards: "
            f"python -m mlx_streamexperts.pack --unpack --model {folder}"
        )
