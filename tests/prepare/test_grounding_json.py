import json

import building
from raw_files import jpeg

from detclipv2_jax.data.built import read_built
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.prepare.box_json import open_grounding


def test_spans_boxes_and_bad_phrases(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg())
    (tmp_path / "1.jpg").write_bytes(jpeg(seed=1))
    caption = "a red car and the other red car near a tree"
    annotations = [
        ([0, 9], [1, 1, 5, 5]),  # a red car
        ([0, 9], [8, 8, 5, 5]),  # the same phrase, another box
        ([[0, 5], [32, 38]], [2, 2, 9, 9]),  # several spans: "a red near a"
        ([36, 100], [3, 3, 9, 9]),  # past the end: " a tree"
        ([100, 120], [3, 3, 9, 9]),  # nothing of the caption
    ]
    content = {
        "images": [
            {"id": 7, "file_name": "0.jpg", "height": 24, "width": 32, "caption": caption},
            {"id": 8, "file_name": "1.jpg", "height": 24, "width": 32, "caption": " "},
        ],
        "annotations": [
            {"image_id": 7, "bbox": box, "tokens_positive": spans if isinstance(spans[0], list) else [spans]}
            for spans, box in annotations
        ],
    }
    (tmp_path / "g.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    report = building.build("grounding_json", input=str(tmp_path / "g.json"), output=str(out), max_bad_share=0.5)
    assert report["left out or repaired"] == {
        "box whose spans are not in the caption": 1,
        "image without a caption": 1,
        "span that ends after the caption": 1,
    }
    reader = open_grounding(str(tmp_path / "g.json"), str(tmp_path), shard_size=1, max_bad_share=0.5)
    assert (reader.num_items, reader.num_shards, reader.counters) == (1, 1, report["left out or repaired"])
    built = read_built(str(out), Kind.GROUNDING)
    assert len(built) == 1
    assert built.vocabulary.names == ("a red car", "a red near a", "a tree")
    record = built[0]
    assert record.caption == caption
    assert [record.concepts[i] for i in record.box_concepts] == ["a red car", "a red car", "a red near a", "a tree"]
