"""Which images and categories of an annotation json are read, and ids that fit each other."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import itertools
import random
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from absl import logging

from detclipv2_jax.data.annotations import Ids, boxes_of, usable_id
from detclipv2_jax.data.checks import check_photos, refuse_above_share, resolve, unsafe_path
from detclipv2_jax.data.concepts import display_name
from detclipv2_jax.data.schema import DataError

_NUM_NAMED = 10  # categories in a message


def file_name(image: dict[str, Any]) -> str:
    """Returns the file of an image; LVIS gives no name but an address that ends with split/file."""
    return str(image.get("file_name") or "/".join(str(image.get("coco_url", "")).split("/")[-2:]))


def photo_path(image: dict[str, Any], folder: str, *, where: Any) -> str:
    """Returns the path of an image in a folder (see `resolve`); ValueError for a name that leads out of it."""
    if unsafe_path(file_name(image)):
        raise ValueError(f"{where}: the file name {file_name(image)!r} leads out of the folder of images")
    return resolve(folder, file_name(image))


def with_fitting_ids(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns a json whose annotations are objects that carry the ids of images and categories, and what was repaired.

    "2" or 2.0 becomes the listed 2; an id that is neither number nor text becomes null.
    """
    rows = [row if isinstance(row, dict) else {} for row in content["annotations"]]
    repaired = {"annotation that is no object": sum(not isinstance(row, dict) for row in content["annotations"])}
    for entries, key in (("images", "image_id"), ("categories", "category_id")):
        listed = [entry.get("id") for entry in content.get(entries) or () if isinstance(entry, dict)]
        ids = Ids([value for value in map(usable_id, listed) if value is not None])
        given = [row.get(key) for row in rows]
        found, num_others = ids.find(given)
        repaired[f"{key} of another type than the id it names"] = num_others
        if not num_others and (found >= 0).all():
            continue
        for i, (place, value) in enumerate(zip(found.tolist(), given, strict=True)):
            if place >= 0 and ids.ids[place] is not value:
                rows[i][key] = ids.ids[place]
            elif place < 0 and value is not None and usable_id(value) is None:
                rows[i][key] = None
    return content | {"annotations": rows}, {what: num for what, num in repaired.items() if num}


def select_images(
    content: dict[str, Any], folder: str, path: Any, *, max_examples: int, max_bad_share: float
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Returns the usable images, in order, each id once, and the counts of what was repaired.

    They must be in `folder`, all but a share, unless it is "".
    """
    images = content["images"][:max_examples] if max_examples else content["images"]
    bad: collections.Counter[str] = collections.Counter()
    repaired: collections.Counter[str] = collections.Counter()
    named = collections.defaultdict(set)
    ids = [usable_id(image.get("id")) if isinstance(image, dict) else None for image in images]
    for key, image in zip(ids, images, strict=True):
        if key is not None:
            named[str(key)].add((file_name(image), str(image.get("caption"))))  # to which the spans of boxes belong
    seen, kept = set(), []
    for key, image in zip(ids, images, strict=True):
        if key is None or unsafe_path(file_name(image)):
            bad["without id" if key is None else "with a file name outside the folder"] += 1
        elif len(named[str(key)]) > 1:
            bad["sharing their id with another image"] += 1
        elif key in seen:
            repaired["image listed twice"] += 1
        else:
            seen.add(key)
            kept.append(image)
    refuse_above_share(bad, len(images), max_bad_share, what="images", where=path)
    if folder:
        check_photos(folder, len(kept), lambda i: file_name(kept[i]), where=path, max_bad_share=max_bad_share)
    return kept, dict(bad + repaired)


def few_shot(content: dict[str, Any], *, num_shots: int, seed: int) -> dict[str, Any]:
    """Returns a COCO json with the images of GLIP's few-shot split, in which each category is on `num_shots` or more.

    Images with a box wider and higher than 1 px are sorted by id and shuffled by Python's generator. One after the
    other is taken if a category on it has not had `num_shots` images yet; it counts for every category on it. A
    category that is on fewer images has them all.
    """
    present = collections.defaultdict(set)  # categories of every image
    usable = set()
    boxes, _ = boxes_of(content["annotations"])
    for annotation, (_, _, width, height) in zip(content["annotations"], boxes.tolist(), strict=True):
        present[annotation.get("image_id")].add(annotation.get("category_id"))
        if width > 1 and height > 1:
            usable.add(annotation.get("image_id"))
    listed = (image.get("id") for image in content["images"] if isinstance(image, dict))
    ids = sorted(usable & {*map(usable_id, listed)} - {None}, key=lambda key: (isinstance(key, str), key))
    random.Random(seed).shuffle(ids)
    num_images: collections.Counter[Any] = collections.Counter()
    taken = set()
    for image_id in ids:
        if any(num_images[category] < num_shots for category in present[image_id]):
            taken.add(image_id)
            num_images.update(present[image_id])
    images = [image for image in content["images"] if image.get("id") in taken]
    annotations = [annotation for annotation in content["annotations"] if annotation.get("image_id") in taken]
    return content | {"images": images, "annotations": annotations}


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Categories that are left out with their boxes."""

    names: Sequence[str] = ()
    option: str = "config.detection.drop_categories"  # what the user calls them
    elsewhere: Sequence[str] = ()  # names that `names` may hold beside those of the file, as they are displayed


NOTHING = Dropped()


def dropped_names(names: Iterable[str], known: Collection[str], where: Any) -> set[str]:
    """Returns names of categories as they are displayed; DataError for one that is not among the known ones."""
    wanted = {display_name(name): name for name in names}
    for display, name in wanted.items():
        if display not in known:
            near = difflib.get_close_matches(display, known, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise DataError(f"{where} has no category {name!r}, which drop_categories names{hint}")
    return set(wanted)


def drop_categories(content: dict[str, Any], dropped: Dropped, path: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns a json without some categories and their boxes, and how many those are; DataError for unknown names."""
    if not dropped.names:
        return content, {}
    called = [display_name(str(category.get("name"))) for category in content["categories"]]
    wanted = dropped_names(dropped.names, [*called, *dropped.elsewhere], path)
    pairs = list(zip(called, content["categories"], strict=True))
    ids = {category.get("id") for name, category in pairs if name in wanted}
    kept = [category for name, category in pairs if name not in wanted]
    rows = [row for row in content["annotations"] if row.get("category_id") not in ids]
    num = len(content["annotations"]) - len(rows)
    counts = {"box of a dropped category": num} if num else {}
    return content | {"categories": kept, "annotations": rows}, counts


def say_unused(categories: list[dict[str, Any]], used: Collection[Any], path: Any, *, option: str) -> None:
    """Logs which categories have no box anywhere (their id is not `used`), and the option that leaves them out."""
    unused = [str(category.get("name")) for category in categories if usable_id(category.get("id")) not in used]
    if not unused:
        return
    above = [name for name in unused if all(name in (c.get("name"), c.get("supercategory")) for c in categories)]
    parent = f"; {above[0]!r} is the supercategory of all others" if above and len(categories) > 1 else ""
    named = ", ".join(itertools.islice(map(repr, unused), _NUM_NAMED)) + (" …" if len(unused) > _NUM_NAMED else "")
    logging.warning(
        "%s: %d of %d categories have no box anywhere: %s%s. They are asked for all the same; %s leaves out those that "
        "it names",
        path, len(unused), len(categories), named, parent, option,
    )  # fmt: skip
