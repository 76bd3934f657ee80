"""Names with definitions, for `config.*.dictionary`: from category files, built folders and WordNet.

| input                                       | names                               | definitions                    |
|---------------------------------------------|-------------------------------------|--------------------------------|
| LVIS's categories, or a COCO-format json    | categories and their synonyms       | `def` or `definition`          |
| json `{name: {"synset": …, "meaning": …}}`  | its keys (COCO's classes)           | `meaning`                      |
| .csv `id,…,name`                            | last column (Objects365)            | -                              |
| built folder                                | categories; frequent phrases        | of its categories              |

A name without a definition takes that of an equal name of the other inputs, else a gloss of WordNet. WordNet's first
sense is often wrong (crane: a writer), so that LVIS's and COCO's synsets win, and of the others the first that is a
thing and no individual is taken. The review file lists each choice with the senses that were not chosen.
"""

from __future__ import annotations

import collections
import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from detclipv2_jax import files
from detclipv2_jax.data import concepts
from detclipv2_jax.data.built import PHRASES, VOCABULARY

# lexicographer files of nouns: animal, artifact, body, food, object, person, plant, substance
_THINGS = frozenset({"05", "06", "08", "13", "17", "18", "20", "27"})
_ENDINGS = ("s", "es")  # of plurals that `concepts.key` does not know: TVs, lenses


class Entry(NamedTuple):
    """A name as one input gives it; `origin` says where its definition comes from."""

    name: str
    definition: str
    origin: str
    others: tuple[str, ...] = ()  # glosses that were not chosen


class Sense(NamedTuple):
    """A noun synset."""

    gloss: str  # without examples
    is_thing: bool


class WordNet:
    """The nouns of a WordNet 3.x `dict/` folder (index.noun, data.noun, noun.exc)."""

    def __init__(self, folder: str):
        self._path = Path(folder)
        missing = [name for name in ("index.noun", "data.noun", "noun.exc") if not (self._path / name).is_file()]
        if missing:
            raise ValueError(f"--wordnet={folder} has no {', '.join(missing)}; it must be WordNet 3.x's dict/ folder")
        rows = self._rows("index.noun")
        self._offsets = {row[0]: [int(offset) for offset in row[6 + int(row[3]) :]] for row in rows}
        self._singular = {row[0]: row[1] for row in self._rows("noun.exc")}
        self._data = (self._path / "data.noun").read_bytes()

    def _rows(self, file: str) -> Iterator[list[str]]:
        lines = files.read_lines(self._path / file)
        return (line.split() for line in lines if line[:1].strip())  # the licence is indented

    def senses(self, name: str) -> list[Sense]:
        """Returns the senses of a name or its singular, of "cabinet/shelf" those of its first known part."""
        for part in _parts(name):
            word = concepts.key(part).replace(" ", "_")
            plain = part.strip().lower().replace(" ", "_")  # a key has lost its s
            stems = [plain.removesuffix(ending) for ending in _ENDINGS]
            for lemma in (plain, self._singular.get(plain, plain), word, *stems):
                if lemma in self._offsets:
                    return [self._sense(offset) for offset in self._offsets[lemma]]
        return []

    def _sense(self, offset: int) -> Sense:
        head, _, gloss = self._data[offset : self._data.index(b"\n", offset)].decode().partition("|")
        fields = head.split()
        # "@i": an individual, like a writer or a city
        return Sense(gloss.split('; "')[0].strip(), fields[1] in _THINGS and "@i" not in fields)


def _parts(name: str) -> tuple[str, ...]:
    return name, *name.split("/")  # Objects365 has "Monitor/TV"


def _read_json(path: Path) -> Iterator[Entry]:
    content = files.read_json(path)
    if isinstance(content, dict) and "categories" not in content:
        content = [{"name": name, **facts} for name, facts in content.items() if isinstance(facts, dict)]
    categories = content["categories"] if isinstance(content, dict) else content
    if not isinstance(categories, list) or not categories:
        raise ValueError(f"--input: {path} lists no categories with a name")
    for category in categories:
        name = category.get("name") if isinstance(category, dict) else None
        if not isinstance(name, str) or not concepts.display_name(name):
            raise ValueError(
                f"--input: {path} lists no categories with a name, a text that is more than spaces: {category}"
            )
        definition = next((str(category[key]) for key in ("def", "definition", "meaning") if category.get(key)), "")
        origin = f"{path.name} {category.get('synset', '')}".strip() if definition else ""
        synonyms = category.get("synonyms")
        for word in dict.fromkeys((name, *map(str, synonyms if isinstance(synonyms, list) else ()))):
            yield Entry(concepts.display_name(word), definition, origin)


def read_names(path: Path, phrases: collections.Counter[str]) -> Iterator[Entry]:
    """Yields the names of an input; adds the phrases of a built folder with their numbers to `phrases`."""
    if path.is_dir():
        if not (path / VOCABULARY).is_file():
            raise ValueError(f"--input: the folder {path} is not built: it has no {VOCABULARY}")
        known = files.read_json(path / VOCABULARY)
        if known["category_ids"]:  # else they are phrases of captions, each but a few times
            for name, definition in zip(known["names"], known["definitions"], strict=True):
                yield Entry(name, definition, path.name if definition else "")
        if (path / PHRASES).is_file():
            rows = (line.split("\t") for line in files.read_lines(path / PHRASES) if line)
            phrases.update({phrase: int(number) for phrase, number in rows})
    elif path.suffix == ".csv":
        yield from (Entry(concepts.display_name(row[-1]), "", "") for row in csv.reader(files.read_lines(path)) if row)
    elif path.suffix == ".json":
        yield from _read_json(path)
    else:
        raise ValueError(f"--input: {path} is none of .json, .csv and a built folder")


def make(inputs: Sequence[str], output: str, *, wordnet: str = "", num_names: int = 14_000) -> dict[str, int]:
    """Returns how many definitions come from where, after writing the dictionary and, beside it, its review file.

    Args:
      inputs: files and folders; of equal names the first spelling counts.
      output: TSV `name <tab> definition`; `<stem>.review.tsv` has origin, frequency and other senses too.
      wordnet: WordNet's dict/ folder; "" for no glosses.
      num_names: phrases are added, most frequent first, until there are so many names.

    Raises:
      ValueError: an input is missing or of another format, or there are no names.
    """
    if missing := [path for path in inputs if not Path(path).exists()]:
        raise ValueError(f"--input: {', '.join(missing)} does not exist")
    frequency: collections.Counter[str] = collections.Counter()
    listed = [entry for path in inputs for entry in read_names(Path(path), frequency)]
    most_frequent = sorted(frequency.items(), key=lambda item: (-item[1], item[0]))
    senses_of = WordNet(wordnet).senses if wordnet else lambda name: []
    defined: dict[str, Entry] = {}
    for entry in listed:
        if entry.definition:
            defined.setdefault(concepts.key(entry.name), entry)
    entries: dict[str, Entry] = {}
    names = [entry.name for entry in listed]
    for i, name in enumerate((*names, *(phrase for phrase, _ in most_frequent))):
        if i >= len(names) and len(entries) >= num_names:
            break
        key = concepts.key(name)
        if key and key not in entries:
            known = next((defined[part] for part in map(concepts.key, _parts(name)) if part in defined), None)
            entries[key] = _define(name, known, senses_of(name))
    if not entries:
        raise ValueError("--input names no categories and no phrases")
    rows = [(entry.name, entry.definition) for entry in entries.values()]
    _write(Path(output), ("name", "definition"), rows)
    counts: collections.Counter[str] = collections.Counter()
    for phrase, number in frequency.items():
        counts[concepts.key(phrase)] += number
    header = ("name", "definition", "origin", "frequency in captions", "other senses")
    review = (
        (entry.name, entry.definition, entry.origin, str(counts[key]), " | ".join(entry.others))
        for key, entry in entries.items()
    )
    _write(Path(output).with_suffix(".review.tsv"), header, review)
    origins = collections.Counter(entry.origin.split(" ")[0] or "none" for entry in entries.values())
    return dict(origins.most_common())


def _define(name: str, known: Entry | None, senses: list[Sense]) -> Entry:
    if known or not senses:
        others = tuple(sense.gloss for sense in senses if not known or sense.gloss != known.definition)
        return Entry(name, known.definition if known else "", known.origin if known else "", others)
    chosen = next((i for i, sense in enumerate(senses) if sense.is_thing), 0)
    others = tuple(sense.gloss for i, sense in enumerate(senses) if i != chosen)
    return Entry(name, senses[chosen].gloss, f"wordnet sense {chosen + 1} of {len(senses)}", others)


def _write(path: Path, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    lines = ("\t".join(" ".join(field.split()) for field in row) for row in (header, *rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
