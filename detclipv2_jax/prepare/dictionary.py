"""Names with definitions, for `config.*.dictionary`: from category files, built folders and WordNet.

| input                                       | names                               | definitions                    |
|---------------------------------------------|-------------------------------------|--------------------------------|
| LVIS's categories, or a COCO-format json    | categories and their synonyms       | `def` or `definition`          |
| json `{name: {"synset": …, "meaning": …}}`  | its keys (COCO's classes)           | `meaning`                      |
| .csv `id,…,name`                            | last column (Objects365)            | -                              |
| built folder                                | categories; frequent phrases        | of its categories              |

A name without a definition takes, as DetCLIP does, that of the nearest entry: the first that there is of

1. an equal name of the other inputs, also one that is written as one word ("Bow Tie", "bow-tie");
2. its synset, of the other inputs or WordNet;
3. a gloss of WordNet. Its first sense is often wrong (crane: a writer): the first that is a thing and no individual;
4. its head word, found as in 1 and 3: "Other Shoes" are shoes, a "slice of red pizza" is a slice;
5. with a text tower, the defined name whose embedding is most similar. Where the tower finds the head word of 4 less
   similar than that name by more than HEAD_MARGIN, this one counts: a "Trash bin Can" is a trash can, no food can.

The review file lists each choice, what it was taken from, and the senses that were not chosen.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import importlib.resources
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from detclipv2_jax import files
from detclipv2_jax.data import concepts
from detclipv2_jax.data.built import PHRASES, VOCABULARY
from detclipv2_jax.prepare.text_tower import similarities

_LISTS = ("objects365", "lvis", "coco")  # of names, in the package
_WITHOUT_LIST = ("V3Det", "ODinW")
HEAD_MARGIN = 0.05  # of cosines; a choice, not measured with the weights of CLIP
_QUALIFIER = re.compile(r"\s*\(.*?\)|\s+(?:of|with|for|in|on)\s.*")  # what follows a head word
_NEAREST = ("synset", "head", "text")  # first words of origins that are of another name
# lexicographer files of nouns: animal, artifact, body, food, object, person, plant, substance
_THINGS = frozenset({"05", "06", "08", "13", "17", "18", "20", "27"})
_ENDINGS = ("s", "es")  # of plurals that `concepts.key` does not know: TVs, lenses


class Entry(NamedTuple):
    """A name as one input gives it; `origin` says where its definition comes from."""

    name: str
    definition: str
    origin: str
    others: tuple[str, ...] = ()  # glosses that were not chosen
    synset: str = ""  # crane.n.05
    head: str = ""  # the word of its name whose definition it took


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
        with _naming(self._path, "wordnet"):
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

    def sense_of(self, synset: str) -> Sense | None:
        """Returns the sense of a noun's synset like crane.n.05."""
        lemma, _, number = synset.rpartition(".n.")
        offsets = self._offsets.get(lemma.lower(), [])
        return self._sense(offsets[int(number) - 1]) if number.isdigit() and 0 < int(number) <= len(offsets) else None

    def _sense(self, offset: int) -> Sense:
        with _naming(self._path, "wordnet"):
            head, _, gloss = self._data[offset : self._data.index(b"\n", offset)].decode().partition("|")
            fields = head.split()
            # "@i": an individual, like a writer or a city
            return Sense(gloss.split('; "')[0].strip(), fields[1] in _THINGS and "@i" not in fields)


def _parts(name: str) -> tuple[str, ...]:
    return name, *name.split("/")  # Objects365 has "Monitor/TV"


def _keys(name: str) -> tuple[str, str]:
    """Returns a name as it is compared, as it is and in one word: "Bow Tie" is a "bow-tie"."""
    key = concepts.key(name)
    return key, re.sub(r"[\W_]", "", key)


def _heads(name: str) -> Iterator[str]:
    """Yields what a name may be a kind of, the longest first: "red sports car" is a sports car, a car."""
    for part in _parts(name):
        head = _QUALIFIER.sub("", part).strip()
        if head and head != part:
            yield head
        words = head.split()
        yield from (" ".join(words[i:]) for i in range(1, len(words)))


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
        synset = str(category.get("synset") or "")
        origin = f"{path.name} {synset}".strip() if definition else ""
        synonyms = category.get("synonyms")
        for word in dict.fromkeys((name, *map(str, synonyms if isinstance(synonyms, list) else ()))):
            yield Entry(concepts.display_name(word), definition, origin, synset=synset)


@contextlib.contextmanager
def _naming(path: Path, option: str) -> Iterator[None]:
    """Turns errors of what reads a file or folder into a ValueError that names it."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, csv.Error) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(
            f"--{option}: {path} is damaged or of another form ({type(error).__name__}: {error})"
        ) from error


def read_names(path: Path, phrases: collections.Counter[str]) -> list[Entry]:
    """Returns the names of an input; adds the phrases of a built folder with their numbers to `phrases`.

    Raises:
      ValueError: it is none of the documented inputs; names it.
    """
    with _naming(path, "input"):
        return list(_names_of(path, phrases))


def _names_of(path: Path, phrases: collections.Counter[str]) -> Iterator[Entry]:
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
        for row in filter(None, csv.reader(files.read_lines(path), strict=True)):
            if not (name := concepts.display_name(row[-1])):
                raise ValueError(f"--input: {path} has no name in the last column of {','.join(row)[:80]!r}")
            yield Entry(name, "", "")
    elif path.suffix == ".json":
        yield from _read_json(path)
    else:
        raise ValueError(f"--input: {path} is none of .json, .csv and a built folder")


class _Definitions:
    """Finds the definition of a name; see the module."""

    def __init__(self, listed: Iterable[Entry], wordnet: WordNet | None):
        self._wordnet = wordnet
        self._by_key: dict[str, Entry] = {}
        self._by_synset: dict[str, Entry] = {}
        for entry in listed:
            if entry.definition:
                for key in _keys(entry.name):
                    self._by_key.setdefault(key, entry)
                if entry.synset:
                    self._by_synset.setdefault(entry.synset, entry)

    def find(self, name: str, synset: str) -> Entry:
        """Returns the entry of a name, without a definition where only a text tower could find one."""
        senses = self._wordnet.senses(name) if self._wordnet else []
        keys = (key for part in _parts(name) for key in _keys(part))
        known = next((self._by_key[key] for key in keys if key in self._by_key), None) or self._of_synset(synset)
        if known or senses:
            return _choose(name, known, senses)
        for head in _heads(name):
            if (found := self._by_key.get(concepts.key(head))) is None and self._wordnet:
                found = _choose(head, None, self._wordnet.senses(head))
            if found and found.definition:
                return Entry(name, found.definition, f"head word {head}: {found.origin}", found.others, head=head)
        return Entry(name, "", "")

    def _of_synset(self, synset: str) -> Entry | None:
        if (entry := self._by_synset.get(synset)) is not None:
            return entry._replace(origin=f"synset of {entry.name}: {entry.origin}")
        sense = self._wordnet.sense_of(synset) if self._wordnet and synset else None
        return Entry("", sense.gloss, f"synset {synset}: wordnet") if sense else None


def make(
    inputs: Sequence[str], output: str, *, wordnet: str = "", text: str = "", num_names: int = 14_000
) -> dict[str, int]:
    """Returns how many definitions come from where, after writing the dictionary and, beside it, its review file.

    Args:
      inputs: files and folders; of equal names the first spelling counts.
      output: TSV `name <tab> definition`; `<stem>.review.tsv` has origin, frequency and other senses too.
      wordnet: WordNet's dict/ folder; "" for no glosses.
      text: a converted text tower; "" leaves names without a definition that have no near entry by synset or head word,
        and keeps every match of a head word.
      num_names: phrases are added, most frequent first, until there are so many names.

    Raises:
      ValueError: an input is missing or of another format, or there are no names.
    """
    if missing := [path for path in inputs if not Path(path).exists()]:
        raise ValueError(f"--input: {', '.join(missing)} does not exist")
    frequency: collections.Counter[str] = collections.Counter()
    listed = [entry for path in inputs for entry in read_names(Path(path), frequency)]
    most_frequent = sorted(frequency.items(), key=lambda item: (-item[1], item[0]))
    definitions = _Definitions(listed, WordNet(wordnet) if wordnet else None)
    entries: dict[str, Entry] = {}
    for i, entry in enumerate((*listed, *(Entry(phrase, "", "") for phrase, _ in most_frequent))):
        if i >= len(listed) and len(entries) >= num_names:
            break
        key = concepts.key(entry.name)
        if key and key not in entries:
            entries[key] = definitions.find(entry.name, entry.synset)
    if not entries:
        raise ValueError("--input names no categories and no phrases")
    if text:
        _fill(entries, text)
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


def _fill(entries: dict[str, Entry], tower: str) -> None:
    """Gives entries the definition of the defined one whose name a text tower finds most similar.

    That are those without one, and those of head words that the tower finds less similar by more than HEAD_MARGIN.
    """
    asked = {key: entry for key, entry in entries.items() if entry.head or not entry.definition}
    # an entry that took its definition from another name would only lead to that one
    defined = [entry for entry in entries.values() if entry.definition and not entry.origin.startswith(_NEAREST)]
    if not asked or not defined:
        return
    heads = {head: len(defined) + i for i, head in enumerate(dict.fromkeys(entry.head for entry in asked.values()))}
    names = [entry.name for entry in asked.values()]
    cosine = similarities(names, [*(entry.name for entry in defined), *heads], tower=tower)
    nearest = cosine[:, : len(defined)].argmax(axis=1).tolist()  # the first of equals
    for row, (key, entry), i in zip(cosine, asked.items(), nearest, strict=True):
        near, of_head = defined[i], row[heads[entry.head]]
        if entry.head and of_head >= row[i] - HEAD_MARGIN:
            continue
        instead = f", not head word {entry.head} {of_head:.2f}" if entry.head else ""
        origin = f"text {near.name} {row[i]:.2f}{instead}: {near.origin}"
        entries[key] = entry._replace(definition=near.definition, origin=origin, others=near.others)


def coverage(output: str, inputs: Sequence[str] = ()) -> list[str]:
    """Returns a line for each list of names on how many of them the dictionary defines, and how.

    The review file lies beside it; category files among the inputs are looked at beside the lists of the package.
    """
    with Path(output).with_suffix(".review.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    origins = {concepts.key(row["name"]): row["origin"].split(" ")[0] for row in rows if row["definition"]}
    folder = importlib.resources.files(concepts.__package__) / "vocabularies"
    lists = {name: (folder / f"{name}.tsv").read_text(encoding="utf-8").splitlines() for name in _LISTS}
    for path in map(Path, inputs):
        if path.suffix in (".json", ".csv"):
            lists[path.name] = [entry.name for entry in read_names(path, collections.Counter())]
    lines = []
    for title, names in lists.items():
        keys = {concepts.key(name): name for name in reversed(names)}
        how = collections.Counter(origins.get(key, "none") for key in keys)
        wanting = [name for key, name in reversed(keys.items()) if key not in origins]
        some = f": {', '.join(wanting[:10])}{', …' if len(wanting) > 10 else ''}" if wanting else ""
        near = ", ".join(f"{how[kind]} by {kind}" for kind in _NEAREST)
        num_own = len(keys) - how["none"] - sum(how[kind] for kind in _NEAREST)
        lines.append(
            f"{title}: {len(keys)} names, {num_own} defined as such, {near}, {how['none']} without a definition{some}"
        )
    given = " ".join(path for path in inputs if path.endswith((".json", ".csv"))).lower()
    if unknown := ", ".join(title for title in _WITHOUT_LIST if title.lower() not in given):
        lines.append(f"{unknown}: not in the package; --input with a .json or .csv of the names prints their coverage")
    return lines


def _choose(name: str, known: Entry | None, senses: list[Sense]) -> Entry:
    if known or not senses:
        others = tuple(sense.gloss for sense in senses if not known or sense.gloss != known.definition)
        return Entry(name, known.definition if known else "", known.origin if known else "", others)
    chosen = next((i for i, sense in enumerate(senses) if sense.is_thing), 0)
    others = tuple(sense.gloss for i, sense in enumerate(senses) if i != chosen)
    return Entry(name, senses[chosen].gloss, f"wordnet sense {chosen + 1} of {len(senses)}", others)


def _write(path: Path, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    lines = ("\t".join(" ".join(field.split()) for field in row) for row in (header, *rows))
    files.write_text(path, (f"{line}\n" for line in lines))
