"""Writes golden_tokenizer.json with the public CLIP tokenizer of open_clip_torch 3.3.0.

Run in an environment with open_clip_torch: `python make_golden_tokenizer.py ../../../shared/data`. The thousands of
lines stand in the fixture as one hash a block of ids; the odd ones as ids.
"""

import csv
import hashlib
import json
import pathlib
import sys

BLOCK = 500
ODD = [
    "",
    "   ",
    "A Red  CAR\twith\nlines",
    "don't we'll I'VE they're",
    "1234 ½ ² Ⅷ ٣",
    "Ünïcödé straße ẞ İstanbul ǅ",
    "日本語 テキスト",
    "😀 emoji 👨‍👩‍👧 flag 🇩🇪",
    "&lt;b&gt; &amp;amp; Tom &amp; Jerry &eacute;&nbsp;x",
    "Ã©tÃ© broken encoding â€œquotesâ€",
    "“curly” ‘quotes’ – dash… ﬁsh Ａ",
    "a\x00b\x1b[31mred\x1b[0m \x85 c\x1c d\u2028e \u200b \u00ad",
    "'ſ K",
    "</w> </w",
    "!!!??? ... --- ___ #@$%^&*()",
    "supercalifragilisticexpialidocious-antidisestablishmentarianism",
    "x" * 10000,
    "the quick brown fox jumps over the lazy dog " * 30,
]


def lines(shared_data: pathlib.Path) -> list[str]:
    """Returns names, synonyms and definitions of LVIS, Objects365 and COCO, bare and in sentences."""
    folder = shared_data / "categories"
    texts = []
    for category in json.loads((folder / "lvis_v1_categories.json").read_text()):
        name = category["name"].replace("_", " ")
        texts += [category["name"], category["def"], f"{name}, {category['def']}", category["synset"]]
        texts += [*category["synonyms"], f"A photo of the {name}.", f"{name.upper()}'s {category['id']}"]
    with (folder / "Objects365_names_fix.csv").open() as file:
        for row in csv.reader(file):
            texts += [*row, " / ".join(row)]
    for name, entry in json.loads((folder / "coco_to_synset.json").read_text()).items():
        texts += [name, entry["meaning"], entry["synset"]]
    return texts


def block_hash(ids: list[list[int]]) -> str:
    """Returns the hash of the ids of a block of lines."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def main() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    encode = SimpleTokenizer().encode
    texts = lines(pathlib.Path(sys.argv[1]))
    blocks = [block_hash([encode(t) for t in texts[i : i + BLOCK]]) for i in range(0, len(texts), BLOCK)]
    content = {"num_lines": len(texts), "blocks": blocks, "odd": [encode(text)[:100] for text in ODD]}
    path = pathlib.Path(__file__).with_name("golden_tokenizer.json")
    path.write_text(json.dumps(content, indent=0).replace("\n", "") + "\n")
    print(f"{len(texts)} lines, {len(blocks)} blocks, {len(ODD)} odd lines -> {path}")


if __name__ == "__main__":
    main()
