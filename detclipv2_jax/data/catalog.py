"""The paper's data sets and its dictionary: where they come from, and the commands that build them."""

from __future__ import annotations

from pathlib import PurePath
from typing import NamedTuple

from detclipv2_jax.data.schema import Kind


class Dataset(NamedTuple):
    """One published data set."""

    title: str
    kind: Kind
    num_examples: int  # that the paper, or the file, has
    origin: str
    arguments: str  # of `python -m detclipv2_jax.prepare`, but --output
    num_names: int = 0  # categories; 0: phrases


DATASETS = {  # by the name of the built folder
    "objects365": Dataset(
        "Objects365 v2, class-balanced 0.66M",
        Kind.DETECTION,
        660_000,
        "objects365.org: zhiyuan_objv2_train.json and the patches; the json names images/v1/patch*/, images/v2/patch*/",
        "coco_json --input=data/raw/objects365/zhiyuan_objv2_train.json --images=data/raw/objects365 "
        "--num_examples=660000",
        num_names=365,
    ),
    "gqa": Dataset(
        "GoldG: GQA without COCO's photos",
        Kind.GROUNDING,
        621_000,
        "MDETR's annotations final_mixed_train_no_coco.json, Visual Genome's photos as distributed by GQA",
        "grounding_json --input=data/raw/mdetr/final_mixed_train_no_coco.json --images=data/raw/gqa/images",
    ),
    "flickr30k": Dataset(
        "GoldG: Flickr30k Entities",
        Kind.GROUNDING,
        149_000,
        "MDETR's annotations final_flickr_separateGT_train.json, the photos of Flickr30k",
        "grounding_json --input=data/raw/mdetr/final_flickr_separateGT_train.json "
        "--images=data/raw/flickr30k/flickr30k-images",
    ),
    "cc3m": Dataset(
        "Conceptual Captions",
        Kind.IMAGE_TEXT,
        3_000_000,
        "its TSV of addresses, downloaded by img2dataset as webdataset shards",
        "image_text --input=data/raw/cc3m",
    ),
    "cc12m": Dataset(
        "Conceptual 12M",
        Kind.IMAGE_TEXT,
        10_000_000,
        "its TSV of addresses, downloaded by img2dataset as webdataset shards; some 2M links are dead",
        "image_text --input=data/raw/cc12m",
    ),
    "yfcc1m_boxes": Dataset(
        "DetCLIP v1: 1M pairs of YFCC100M with pseudo boxes",
        Kind.GROUNDING,
        1_000_000,
        "pairs downloaded by img2dataset as webdataset shards to data/raw/yfcc1m, then python -m detclipv2_jax.prepare "
        "pseudo_boxes --checkpoint=runs/detclip_v1_o365_goldg --input=data/raw/yfcc1m --dictionary=data/dictionary.tsv "
        "--output=data/raw/yfcc1m_boxes",
        "grounding_json --input=data/raw/yfcc1m_boxes/grounding.json --images=data/raw/yfcc1m_boxes",
    ),
    "imagenet1k": Dataset(
        "ImageNet-1k train, class names as captions",
        Kind.IMAGE_TEXT,
        1_281_167,
        "image-net.org: ILSVRC2012 train/ with a folder a class, LOC_synset_mapping.txt with their names",
        "classes --input=data/raw/imagenet/train --names=data/raw/imagenet/LOC_synset_mapping.txt",
        num_names=1000,
    ),
    "lvis": Dataset(
        "LVIS v1 train",
        Kind.DETECTION,
        100_170,
        "lvis_v1_train.json, COCO's photos (train2017/ and val2017/)",
        "lvis --input=data/raw/lvis/lvis_v1_train.json --images=data/raw/coco",
        num_names=1203,
    ),
    "coco": Dataset(
        "COCO train2017",
        Kind.DETECTION,
        118_287,
        "instances_train2017.json, COCO's photos",
        "coco_json --input=data/raw/coco/annotations/instances_train2017.json --images=data/raw/coco/train2017",
        num_names=80,
    ),
}
# LVIS's json first, which defines its names; categories and frequent phrases of the folders above follow
_OF_DICTIONARY = (
    "dictionary --input=data/lvis/lvis_v1_minival_inserted_image_name.json,data/objects365,data/cc3m,data/cc12m "
    "--wordnet=/usr/share/wordnet --text=weights/clip_text_vit_b32.safetensors"
)
_ANY = {
    Kind.DETECTION: "coco_json --input=ANNOTATIONS.json --images=FOLDER",
    Kind.GROUNDING: "grounding_json --input=ANNOTATIONS.json --images=FOLDER",
    Kind.IMAGE_TEXT: "image_text --input=TSV_OR_FOLDER_OF_TAR_FILES",
}


def command_of(folder: str, kind: Kind) -> str:
    """Returns the command that builds a folder: of the data set it is named after, else with gaps to fill."""
    known = DATASETS.get(PurePath(folder).name)
    arguments = known.arguments if known and known.kind is kind else _ANY[kind]
    return f"python -m detclipv2_jax.prepare {arguments} --output={folder}"


def dictionary_command(path: str | PurePath) -> str:
    """Returns the command that builds a dictionary, and what its inputs are, as a comment of the shell."""
    return (
        f"python -m detclipv2_jax.prepare {_OF_DICTIONARY} --output={path}   # --wordnet: the dict/ folder of WordNet "
        "3.x (Debian: wordnet-base); leave out inputs that you do not have"
    )
