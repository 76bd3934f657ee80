"""Which names have a definition, and how many names negatives are drawn from: lines for the log and the preflight.

A name that the dictionary lacks is encoded as it is; a run says so before it starts.
"""

from __future__ import annotations

from collections.abc import Sequence

from detclipv2_jax.data.evaluation_set import GroundTruth
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.data.streams import Stream
from detclipv2_jax.files import printable

_NUM_SHOWN = 5  # names in a line


def defined(names: Sequence[str], definitions: Sequence[str]) -> str:
    """Returns how many names have a definition, "" being none, and which are the first without."""
    without = [name for name, definition in zip(names, definitions, strict=True) if not definition]
    shown = ", ".join(map(printable, without[:_NUM_SHOWN])) + ", …" * (len(without) > _NUM_SHOWN)
    first = f" (first without: {shown})" if without else ""
    return f"{len(names) - len(without):,} of {len(names):,} names have a definition{first}"


def training_notes(streams: Sequence[Stream]) -> list[str]:
    """Returns a line for each source whose names are encoded with definitions, and for each pool of grounding."""
    notes: dict[str, None] = {}  # in order, once: sources and pools are shared by canvases
    for stream in streams:
        for source, known in zip(stream.sources, stream.vocabularies, strict=True):
            where, names = f"{stream.kind}, {source.name}", source.vocabulary.names
            if stream.definitions and names:
                notes[f"{where}: {defined(names, [known.definition(name) for name in names])}"] = None
            elif stream.definitions:
                line = f"{where}: of the dictionary {defined(known.names, known.definitions)}"
                notes[f"{line}; phrases without one are counted"] = None
            if stream.kind is Kind.GROUNDING:
                origin = "its own phrases" if known is source.vocabulary else "those of the dictionary"
                where = where if known is source.vocabulary else str(stream.kind)
                notes[f"{where}: {len(known):,} names to draw negatives from, {origin}"] = None
    return list(notes)


def evaluation_notes(ground_truth: GroundTruth, *, prefix: str = "config.eval") -> list[str]:
    """Returns a line on the names that are asked for; none where they are asked for without definitions.

    `prefix` is the section of the configuration.
    """
    if not ground_truth.definitions:
        return []
    known = ground_truth.vocabulary
    return [f"{prefix.removeprefix('config.')}: {defined(known.names, known.definitions)}"]
