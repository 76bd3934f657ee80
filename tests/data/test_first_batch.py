"""What the first batch of each kind holds that was built, as `configs/swin_t.py` has it, in words."""

import json

import building
from conftest import CAPTIONS

from configs import swin_t
from detclipv2_jax.data import tokenizer
from detclipv2_jax.data.streams import train_streams

DICTIONARY = """\
cat\ta small animal
dog\ta loyal animal
cups\ta vessel for drinks
zebra\ta striped horse
anvil\ta block of iron
horse\ta tall animal
"""
EXPECTED = {
    "detection": """\
0: cat, a small animal | dog, a loyal animal
1: dog, a loyal animal | red car
2: red car | tree
3: tree | traffic light
negatives: cup, a vessel for drinks""",
    "grounding": """\
0: a cat | a dog
1: red car | tree
2: a cup | traffic light
3: dogs | a cat
negatives: anvil | cat | cups | dog | horse | zebra""",
    "image_text": """\
0: a cat and a dog on grass | a cat | a dog
1: the red car left of a tree | red car | tree
2: a cup near the traffic light | a cup | traffic light
3: two dogs and a cat | dogs | a cat
negatives: """,
}


def in_words(batch):
    """Returns the concepts of each image in the order of the examples, and the others of the table."""
    texts = [text.replace(" ,", ",") for text in tokenizer.decode(batch.concept_tokens)]
    used, lines = set(), {}
    for i, example in enumerate(batch.example_id.tolist()):
        captions = batch.caption_concepts[i][batch.caption_mask[i]].tolist()
        rows = captions or batch.box_concepts[i][batch.box_mask[i]].tolist()
        used.update(rows)
        lines[example] = f"{example}: " + " | ".join(texts[row] for row in rows)
    others = sorted(texts[row] for row in range(len(texts)) if batch.concept_mask[row] and row not in used)
    return "\n".join([*(lines[example] for example in sorted(lines)), f"negatives: {' | '.join(others)}"])


def test_the_first_batch_of_every_kind(world):
    for kind, builder in (("detection", "coco_json"), ("grounding", "grounding_json"), ("image_text", "image_text")):
        source = world / ("pairs.tsv" if kind == "image_text" else f"{kind}.json")
        building.build(builder, input=str(source), images=str(world / "images"), output=str(world / "built" / kind))
    (world / "dictionary.tsv").write_text(DICTIONARY)
    config = swin_t.get_config()
    for kind in EXPECTED:
        section = config[kind]
        assert section.dictionary == ("" if kind == "image_text" else "data/dictionary.tsv")
        section.data, section.max_examples, section.batch_size = (str(world / "built" / kind),), 4, 4
        section.canvases, section.short_side, section.long_side = ((64, 64),), (64, 64), 64
        section.dictionary = str(world / "dictionary.tsv") if section.dictionary else ""
    streams = train_streams(config)
    assert [stream.kind for stream in streams] == list(EXPECTED)
    for stream in streams:
        assert in_words(stream.batch(0)) == EXPECTED[stream.kind], stream.name
    assert json.loads((world / "detection.json").read_text())["categories"][5]["name"] == "cup"
    assert all(name.split()[-1] not in " ".join(CAPTIONS[:4]) for name in ("anvil", "zebra", "horse"))
