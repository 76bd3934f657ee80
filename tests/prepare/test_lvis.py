import json

import building
import pytest
from raw_files import write_coco

from detclipv2_jax.data.built import read_built
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.prepare.box_json import open_lvis


def lvis_json(tmp_path):
    path = write_coco(tmp_path / "raw")
    (path.parent / "train2017").mkdir()
    content = json.loads(path.read_text())
    for image in content["images"]:
        name = image.pop("file_name")
        (path.parent / "images" / name).rename(path.parent / "train2017" / name)
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{name}"
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = [3], [2]
    for category, frequency in zip(content["categories"], "rrc", strict=True):
        category["frequency"], category["def"] = frequency, f"definition {category['id']}"
    path.write_text(json.dumps(content))
    return path, content


def test_federated_lists_definitions_and_frequencies(tmp_path):
    path, _ = lvis_json(tmp_path)
    report = building.build("lvis", input=str(path), images=str(path.parent), output=str(tmp_path / "out"))
    assert report["categories by frequency"] == {"rare": 2, "common": 1}
    assert report["federated"] is True
    built = read_built(str(tmp_path / "out"), Kind.DETECTION)
    assert (built[0].negatives, built[0].not_negatives) == (("thing 3",), ("thing 2",))
    assert built.federated
    assert built.describe(1).startswith("train2017/000000000001.jpg of ")
    assert all(built[i].federated for i in range(len(built)))
    assert built.vocabulary.definitions == ("definition 1", "definition 2", "definition 3")
    assert built.vocabulary.category_ids == (1, 2, 3)


@pytest.mark.parametrize("listed", ["neg_category_ids", "not_exhaustive_category_ids", ""])
def test_a_folder_of_before_is_federated_if_its_examples_list_names(tmp_path, listed):
    """Its report does not say whether it is; the first images list nothing."""
    path, content = lvis_json(tmp_path)
    for i, image in enumerate(content["images"]):
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            image[key] = [3] if key == listed and i == len(content["images"]) - 1 else []
    path.write_text(json.dumps(content))
    building.build("lvis", input=str(path), images=str(path.parent), output=str(tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "build_report.json").read_text())
    del report["federated"]
    (tmp_path / "out" / "build_report.json").write_text(json.dumps(report))
    built = read_built(str(tmp_path / "out"), Kind.DETECTION)
    assert built.federated == built[0].federated == bool(listed)


def test_a_json_that_is_not_lvis_is_refused(tmp_path):
    path, content = lvis_json(tmp_path)
    without = [{key: value for key, value in image.items() if key[:3] != "not"} for image in content["images"]]
    path.write_text(json.dumps(content | {"images": without}))
    with pytest.raises(ValueError, match=r"lacks not_exhaustive_category_ids; build it"):
        building.build("lvis", input=str(path), images=str(path.parent), output=str(tmp_path / "out"))
    for image in content["images"]:
        del image["neg_category_ids"]
    del content["categories"][0]["frequency"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lacks neg_category_ids, the frequency of every category.*KIND coco_json"):
        open_lvis(str(path), str(path.parent), shard_size=4, max_bad_share=0.0)
