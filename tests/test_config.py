"""The check of a whole configuration, its JSON form, and the configuration files."""

import functools
import itertools
import json
import math
import pathlib
import subprocess
import sys

import pytest

from detclipv2_jax import config as config_lib
from detclipv2_jax import config_json, validation
from detclipv2_jax.data import canvases, catalog, checks
from detclipv2_jax.inference import detect
from detclipv2_jax.models import deform_conv, window_attention

FILES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
VARIANTS = {
    "swin_t": ("o365", "o365_cc3m", "o365_goldg_cc3m", "full", "o365_in1k", "full_in1k", "paper_canvases"),
    "swin_l": ("o365", "full", "paper_canvases"),
    "detclip_v1": ("o365_goldg", "full"),
    "coco_json": ("nano", "overfit", "swin_t", "swin_t_24gb", "swin_t_16gb", "swin_t_frozen_text"),
    "swin_t_one_gpu": ("o365", "full"),
    "eval_lvis": ("val",),
    "finetune_lvis": ("swin_l",),
    "finetune_odinw": ("Raccoon", "Raccoon:swin_l"),
    "supervised_lvis": ("swin_l",),
}
EVERY = [(path.stem, variant) for path in FILES for variant in ("", *VARIANTS.get(path.stem, ()))]


def load(name, variant=""):
    module = __import__(f"configs.{name}", fromlist=["get_config"])
    return module.get_config(variant) if variant else module.get_config()


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_every_config_is_valid_on_one_and_on_many_devices(name, variant):
    config = load(name, variant)
    of_one = name == "swin_t_one_gpu" or variant.startswith("swin_t_")
    for num_devices in (1,) if of_one else (1, 8 if name in ("coco_json", "demo") else 32):
        validation.validate(config, num_devices=num_devices)
    for groups in filter(None, config.optimizer.text_lengths.values()):  # or the longest never find room
        assert groups[0][0] == config.model.text.context_length


@pytest.mark.parametrize("variant", ["swin_t_24gb", "swin_t_16gb", "swin_t_frozen_text"])
def test_recipes_for_one_gpu_are_swin_t_in_chunks(variant):
    recipe, num_chunks = load("coco_json", variant), 2 if variant == "swin_t_24gb" else 4
    accumulated = {"detection": num_chunks, "grounding": 4, "image_text": 2}
    changed = {line.partition(":")[0] for line in config_json.differences(load("coco_json", "swin_t"), recipe)}
    frozen = {"optimizer.frozen", "optimizer.text_once"} if variant == "swin_t_frozen_text" else set()
    chunks = {f"optimizer.accumulate.{kind}" for kind in accumulated}
    rest = {"name", "eval.batch_size", "optimizer.remat.detection", "optimizer.warmup_steps"}
    assert (recipe.optimizer.accumulate.to_dict(), changed) == (accumulated, chunks | rest | frozen)
    assert (recipe.optimizer.frozen, recipe.optimizer.text_once) == (
        ("text_encoder/.*", True) if frozen else ("", False)
    )
    assert recipe.optimizer.warmup_steps < 1000 * recipe.epochs / recipe.detection.batch_size / 5


TABLE_9 = (  # row, keys, values of Swin-T, values of Swin-L where they differ
    ("epochs", "epochs", 12),
    ("optimizer AdamW, betas", "optimizer.b1 optimizer.b2", (0.9, 0.999)),
    ("weight decay", "optimizer.weight_decay", 0.05),
    ("learning rate, image encoder", "optimizer.learning_rate", 2.8e-4, 4e-4),
    ("learning rate, text encoder", "text_rate", 2.8e-5, 4e-5),
    ("schedule", "optimizer.schedule optimizer.warmup_steps optimizer.min_learning_rate", ("cosine", 1000, 0.0)),
    ("batch, detection and grounding", "detection.batch_size grounding.batch_size", (128, 128), (256, 256)),
    ("batch, image-text pairs", "image_text.batch_size", 6144),
    ("resolution, evaluation", "eval.canvases eval.long_side", (((800, 1344), (1344, 800)), 1333)),
    ("range of scales, boxes", "detection.short_side grounding.short_side", ((480, 800),) * 2),
    ("resolution, pairs", "image_text.long_side image_text.short_side", (320, (320, 320))),
    ("random flip", "detection.flip_prob grounding.flip_prob image_text.flip_prob", (0.5, 0.5, 0.5)),
    ("weight of the contrastive loss", "loss.contrastive_weight", 0.1),
    ("weights of box and centerness", "loss.box_weight loss.centerness_weight", (2.0, 1.0)),
    ("temperature, label smoothing", "loss.temperature loss.label_smoothing", (0.5, 0.1)),
    ("proposals k", "loss.num_proposals", 100),
    ("concepts M", "detection.num_concepts grounding.num_concepts", (150, 100)),
    ("tokens of a text", "model.text.context_length", 16),
    ("drop path", "model.swin.drop_path_rate", 0.2),
    ("mixed precision, checkpointing", "model.dtype model.remat", ("bfloat16", "blocks")),
)

WHOLE, FITTING = ((800, 1344), (1344, 800)), ((800, 1216), (1216, 800))
DECIDED = (  # row, keys, the paper's values, those here, which docs/decisions.md has
    ("training canvases", "detection.canvases grounding.canvases", (WHOLE,) * 2, (FITTING,) * 2),
    ("num_scales (0: each photo its own)", "detection.num_scales grounding.num_scales", (0, 0), (3, 3)),
    ("long side of a photo, boxes", "detection grounding", (1333, 1333), (1216, 1216)),
    ("sizes of a landscape canvas", "sizes", ((800, 1344),), ((800, 1216), (640, 960), (480, 736))),
    ("pairs' canvases", "image_text.canvases", ((320, 320),), ((320, 320), (256, 320), (320, 256))),
)


def with_derived(c):
    """Returns the values of a configuration by key, and those that follow from several of them."""
    sizes = {
        kind: [
            canvases.sizes(canvas, short_side=c[kind].short_side, num_scales=c[kind].num_scales)
            for canvas in c[kind].canvases
        ]
        for kind in ("detection", "grounding")
    }
    longest = {kind: min(max(map(max, found[0])), c[kind].long_side) for kind, found in sizes.items()}
    factors = {factor for regex, factor, _ in c.optimizer.groups if regex.startswith("text_encoder")}
    assert len(factors) == 1
    rate = {"text_rate": max(factors) * c.optimizer.learning_rate}
    return config_lib.flat(c) | longest | rate | {"sizes": sizes["detection"][0]}


def found_of(values, keys):
    found = tuple(values[key] for key in keys.split())
    return found if len(found) > 1 else found[0]


@pytest.mark.parametrize("name", ["swin_t", "swin_l"])
def test_what_departs_from_table_9_is_decided_and_has_a_variant_without(name):
    """Prints it: pytest -s."""
    here, paper = with_derived(load(name)), with_derived(load(name, "paper_canvases"))
    print(f"\n{name:36} {'paper':40} here")
    for row, keys, *expected in DECIDED:
        print(f"{row:36} {expected[0]!s:40} {expected[1]} differs, decided; the paper's: {name}.py:paper_canvases")
        assert [found_of(paper, keys), found_of(here, keys)] == expected, row
    changed = {line.partition(":")[0] for line in config_json.differences(load(name), load(name, "paper_canvases"))}
    keys = {f"{kind}.{key}" for kind in ("detection", "grounding") for key in ("canvases", "num_scales")}
    assert changed == keys | {"name", "image_text.canvases"}


@pytest.mark.parametrize("name", ["swin_t", "swin_l"])
def test_pretraining_has_the_values_of_table_9(name):
    """Prints them: pytest -s. What departs on purpose is in the test before."""
    values = with_derived(load(name))
    print(f"\n{name:36} {'paper':40} here")
    wrong = []
    for row, keys, *expected in TABLE_9:
        found, paper = found_of(values, keys), expected[-1 if name == "swin_l" else 0]
        print(f"{row:36} {paper!s:40} {found}")
        if paper != (pytest.approx(found) if isinstance(found, float) else found):
            wrong.append(row)
    assert not wrong


@pytest.mark.parametrize("name", ["swin_t", "swin_l"])
def test_pretraining_uses_one_dictionary_and_is_scored_as_eval_lvis_does(name):
    for variant, grounding, pairs in (
        ("", ("data/gqa", "data/flickr30k"), ("data/cc3m", "data/cc12m")),
        ("o365_cc3m", (), ("data/cc3m",)),
    ):
        c, protocol = load(name, variant), load("eval_lvis")
        assert (c.detection.data, c.grounding.data, c.image_text.data) == (("data/objects365",), grounding, pairs)
        dictionaries = {
            section.dictionary for section in (c.detection, c.grounding, c.eval, load("finetune_lvis").eval)
        }
        assert dictionaries == {"data/dictionary.tsv"}
        assert (c.detection.definitions, c.grounding.definitions, c.eval.definitions) == (True, False, True)
        for key in protocol.eval:
            assert c.eval[key] == protocol.eval[key] or key == "batch_size"
        assert (c.eval.pre_nms, c.eval.max_detections) == (10_000, 1000)
    assert load(name).name == {"swin_t": "swin_t_full", "swin_l": "swin_l"}[name]
    with pytest.raises(ValueError, match=f"'o366' of configs/{name}.py is unknown; allowed are o365, o365_cc3m, "):
        load(name, "o366")


@pytest.mark.parametrize("name", ["swin_t", "swin_l", "detclip_v1"])
def test_canvases_of_pretraining_fit_photos_and_the_papers_way_is_the_default(name):
    c, paper = load(name), config_lib.base()
    for kind in ("detection", "grounding"):
        assert (c[kind].canvases, c[kind].num_scales) == (((800, 1216), (1216, 800)), 3)
        assert (paper[kind].canvases, paper[kind].num_scales) == (((800, 1344), (1344, 800)), 0)
    assert (c.image_text.canvases, c.image_text.num_scales) == (((320, 320), (256, 320), (320, 256)), 0)
    assert (paper.image_text.canvases, paper.image_text.num_scales) == (((320, 320),), 0)


def test_detclip_v1_is_swin_t_without_what_v2_added():
    v1, v2 = load("detclip_v1"), load("swin_t")
    changed = {line.partition(":")[0] for line in config_json.differences(v1, v2) if not line.startswith("chips.")}
    assert changed == {
        "name",
        "grounding.data",
        "image_text.data",
        "model.text.context_length",
        "model.head.deformable",
        "optimizer.text_lengths.grounding",
        "optimizer.text_lengths.image_text",
    }
    assert (v1.model.text.context_length, v1.model.head.deformable, v1.image_text.data) == (48, False, ())
    assert v1.grounding.data == (*v2.grounding.data, "data/yfcc1m_boxes")
    assert load("detclip_v1", "o365_goldg").grounding.data == v2.grounding.data
    with pytest.raises(ValueError, match=r"'o365' of configs/detclip_v1\.py is unknown; allowed are full, o365_goldg"):
        load("detclip_v1", "o365")


def test_a_missing_dictionary_is_listed_with_the_command_that_builds_it():
    [problem] = checks.missing_paths({"config.eval.dictionary": ("no/d.tsv", "file")})
    assert problem == (
        "config.eval.dictionary: the file no/d.tsv does not exist; make it with\n"
        f"    {catalog.dictionary_command('no/d.tsv')}"
    )
    assert checks.missing_paths({"config.eval.images": ("no", "folder")}) == [
        "config.eval.images: the folder no does not exist"
    ]


def test_fine_tuning_has_the_values_of_tables_10_and_11():
    lvis, odinw = load("finetune_lvis"), load("finetune_odinw", "Raccoon")
    for c, epochs, batch_size, text_rate, warmup in ((lvis, 24, 64, 4e-6, 1000), (odinw, 250, 32, 4e-7, 500)):
        assert (c.epochs, c.detection.batch_size, c.optimizer.warmup_steps) == (epochs, batch_size, warmup)
        assert (c.optimizer.learning_rate, c.optimizer.weight_decay, c.model.swin.drop_path_rate) == (4e-5, 0.05, 0.2)
        factors = {factor for regex, factor, _ in c.optimizer.groups if regex.startswith("text_encoder")}
        assert [factor * c.optimizer.learning_rate for factor in factors] == [pytest.approx(text_rate)]
        assert (c.detection.canvases, c.detection.num_concepts) == (((800, 1344), (1344, 800)), 150)
    assert (lvis.optimizer.schedule, odinw.optimizer.schedule) == ("cosine", "plateau")
    c = odinw.optimizer
    assert (c.decay_factor, c.patience, c.min_learning_rate, c.stop_patience) == (0.1, 5, 1e-8, 8)
    assert (odinw.eval.every_epochs, odinw.checkpoint.keep_best) == (1, True)


def test_what_goes_by_scores_needs_them(micro):
    micro.optimizer.schedule, micro.checkpoint.keep_best = "plateau", True
    micro.scenes.num_eval = 0
    micro.eval.monitor, micro.optimizer.decay_factor, micro.optimizer.frozen = "mAP", 1.0, "text_encoder/("
    with pytest.raises(ValueError, match="6 problem") as error:
        validation.validate(micro, num_devices=8)
    for part in (
        "optimizer.schedule plateau and checkpoint.keep_best need scores along the way: set config.eval.every_epochs",
        "need config.eval.annotations and config.eval.images",
        "config.optimizer.min_learning_rate is 0.0; allowed: above 0 with optimizer.schedule plateau",
        "config.eval.monitor is 'mAP'; allowed: AP | AP50",
        "config.optimizer.decay_factor is 1.0; allowed: 0 < value < 1",
        "config.optimizer.frozen is 'text_encoder/('; allowed: a regular expression",
    ):
        assert part in str(error.value), part


def test_generated_scenes_may_be_what_scores_come_from(micro):
    micro.checkpoint.keep_best, micro.eval.every_epochs = True, 1
    validation.validate(micro, num_devices=8)
    micro.scenes.num_eval, micro.eval.annotations = 0, "a.json"
    validation.validate(micro, num_devices=8)
    micro.detection.num_shots = 3  # of the generated scenes, or of a file
    validation.validate(micro, num_devices=8)
    micro.scenes.num_detection = 0
    with pytest.raises(ValueError, match=r"config\.detection\.num_shots is 3; allowed: 0 without"):
        validation.validate(micro, num_devices=8)
    micro.detection.annotations = "b.json"
    validation.validate(micro, num_devices=8)


def test_json_round_trip(micro):
    again = config_json.from_json(config_json.to_json(micro))
    assert config_json.differences(micro, again) == []
    again.loss.temperature = 0.7
    assert config_json.differences(micro, again) == ["loss.temperature: 0.5 -> 0.7"]


def test_stored_configurations_of_this_and_earlier_versions():
    content = config_lib.base().to_dict()
    retired = {"order": "shuffled", "mesh": content["mesh"] | {"cpu_devices": 0}}
    again = config_json.from_json(json.dumps(content | retired))
    assert config_json.differences(config_lib.base(), again) == []
    assert again.is_locked
    for change, message in (
        ({"order": "sorted"}, "config.order is 'sorted'; this version computes 'shuffled' only"),
        ({"mesh": {"fsdp": 1, "cpu_devices": 4}}, "config.mesh.cpu_devices is 4; this version computes 0 only"),
    ):
        with pytest.raises(ValueError, match=message):
            config_json.from_json(json.dumps(content | change))
    del content["loss"]["side"], content["forgetting"]
    assert config_json.differences(config_lib.base(), config_json.from_json(json.dumps(content))) == []


@pytest.mark.parametrize(
    ("key", "fits", "others"),
    [
        ("seed", [0, -5, 1 << 53], [(1 << 53) + 1, True, 1.5, "1", None]),
        ("model.head.channels", [0, 1 << 15], [-1, (1 << 15) + 1, False]),
        ("loss.temperature", [0.5, 3, -1e300], [True, "0.5", 10**400]),
        ("detection.definitions", [True, False], [0, 1, "yes"]),
        ("name", ["", "x"], [3, ["x"]]),
        ("model.swin.depths", [[1, 1, 1, 128]], [[1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 129], [1, 1, 1, True]]),
        ("eval.canvases", [[[32, 16384]], [[64, 64]] * 64], [[], [[48, 64]], [[0, 32]], [[32, 16416]], [[32]]]),
        ("detection.canvases", [[[64, 32]]], [[[64, 64]] * 65, [[64, 64], [64, 65]], [[64, "64"]]]),
        ("detection.data", [[], ["a"], "a"], [3, {"a": 1}]),
        ("model.text.classes", [[], ["a", "b"]], ["a", 3, [1]]),
        ("eval", [], [3, [1]]),
    ],
)  # fmt: skip
def test_types_and_sizes_of_stored_values(key, fits, others):
    *path, last = key.split(".")

    def stored(value):
        content = config_lib.base().to_dict()
        functools.reduce(lambda part, name: part[name], path, content)[last] = value
        config = config_json.from_json(json.dumps(content), where="here")
        return functools.reduce(lambda part, name: part[name], key.split("."), config)

    for value in fits:
        assert json.loads(json.dumps(stored(value))) == value
    for value in others:
        with pytest.raises(ValueError, match=rf"here is none of a run: config\.{key} is .*, not "):
            stored(value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "here is no valid json"),
        ("{", "here is no valid json"),
        ('{"a.b": 1}', "here cannot be read"),
        ("[" + "1, " * 1000 + "1]", r"here must be an object of sections and keys, not \(1, .{1,80}$"),
    ],
)
def test_texts_that_are_no_configuration(text, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        config_json.from_json(text, where="here")


def test_five_problems_of_a_stored_configuration_are_named():
    content = config_lib.base().to_dict()
    del content["seed"]
    with pytest.raises(ValueError, match=r"config\.epochs is 'many', not a whole number$"):  # of what is there
        config_json.from_json(json.dumps(content | {"epochs": "many"}))
    content = config_lib.base().to_dict()
    for key in ("seed", "epochs", "num_steps", "timeout_s", "log_every_steps", "profile_steps", "name"):
        content[key] = [1]
    with pytest.raises(ValueError, match=r"(config\.\w+ is .*; ){5}and 2 more$"):
        config_json.from_json(json.dumps(content))


def test_all_problems_are_listed_at_once(micro):
    micro.loss.side = "both"
    micro.loss.temperature = 0.0
    micro.loss.selection = "iou"
    micro.detection.batch_size = 10
    micro.eval.canvases = ((64, 100),)
    with pytest.raises(ValueError, match="5 problem") as error:
        validation.validate(micro, num_devices=8)
    for part in (
        "config.loss.side is 'both'; allowed: text_to_image | image_to_text | bilateral",
        "config.loss.temperature is 0.0; allowed: above 0",
        "needs the head of the same name",
        "config.detection.batch_size is 10, which is not divisible by 8 devices",
        "config.eval.canvases has (64, 100)",
    ):
        assert part in str(error.value)


def test_files_whose_place_generated_scenes_would_take_are_refused(micro):
    micro.eval.annotations, micro.image_text.pairs, micro.grounding.images = "val.json", "pairs.tsv", "photos"
    with pytest.raises(ValueError, match="3 problem") as error:
        validation.validate(micro, num_devices=8)
    for key, value, kind, num in (
        ("eval.annotations", "val.json", "eval", 12),
        ("image_text.pairs", "pairs.tsv", "image_text", 24),
        ("grounding.images", "photos", "grounding", 24),
    ):
        assert f"config.{key} is {value!r}, but config.scenes.num_{kind} generates {num} scenes" in str(error.value)
        micro.scenes[f"num_{kind}"] = 0
    validation.validate(micro, num_devices=8)


def test_widths_must_be_multiples_of_heads_and_groups(micro):
    micro.model.text.num_heads, micro.model.head.num_groups = 5, 7
    with pytest.raises(ValueError, match="2 problem") as error:
        validation.validate(micro, num_devices=8)
    for part in (
        "model.text.width 16 must be a multiple of num_heads 5",
        "model.head.channels 16 must be a multiple of",
    ):
        assert part in str(error.value)


def test_batches_must_divide_over_devices_and_chunks(micro):
    micro.detection.batch_size, micro.optimizer.accumulate.detection = 16, 2
    validation.validate(micro, num_devices=8)
    micro.optimizer.accumulate.detection = 3
    with pytest.raises(ValueError, match=r"16, which is not divisible by 8 devices x .*detection 3 = 24; .*is: 24"):
        validation.validate(micro, num_devices=8)


def test_model_sizes():
    sizes = {
        name: (c.swin.embed_dim, c.swin.depths, c.swin.num_heads, c.swin.window_size, c.embed_dim, c.dtype)
        for name in ("nano", "swin_t", "swin_s", "swin_b", "swin_l")
        for c in (config_lib.model(name),)
    }
    assert sizes == {
        "nano": (32, (1, 1, 2, 1), (1, 2, 4, 8), 4, 64, "float32"),
        "swin_t": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 512, "bfloat16"),
        "swin_s": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7, 512, "bfloat16"),
        "swin_b": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7, 512, "bfloat16"),
        "swin_l": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12, 512, "bfloat16"),
    }
    c = config_lib.model("swin_t")
    assert (c.head.channels, c.head.num_convs, c.head.num_groups, c.head.deformable) == (256, 4, 32, True)
    assert (c.text.width, c.text.num_layers, c.text.num_heads) == (512, 12, 8)
    assert (c.logit.normalize_regions, c.logit.scale) == (False, 1.0)
    assert c.logit.bias == pytest.approx(math.log(0.01 / 0.99))


def test_what_no_table_says_is_as_decided():
    """Values of ATSS, GLIP and of docs/decisions.md, which no table of the paper has."""
    c = config_lib.base()
    expected = {
        "loss.focal_alpha": 0.25, "loss.focal_gamma": 2.0, "loss.objectness_weight": 1.0,
        "loss.selection_pre_nms": 1000, "loss.selection_nms_iou": 0.6, "loss.matching_temperature": 0.1,
        "loss.selection": "text_batch", "loss.interaction": "phrases", "loss.class_weight": 0.1,
        "loss.class_proposals": 1, "image_text.class_weight": 3.0,
        "loss.selection_scope": "global", "loss.matching": "one_to_one", "loss.side": "text_to_image",
        "loss.chunk_bytes": 134_217_728, "optimizer.clip_norm": 35.0, "optimizer.decay_at": (2 / 3, 11 / 12),
        "optimizer.decay_factor": 0.1, "optimizer.patience": 5, "optimizer.ema_decay": 0.0,
        "eval.nms_iou": 0.6, "eval.pre_nms": 3000, "eval.max_detections": 300, "eval.score_threshold": 0.0,
        "eval.short_side": 800, "eval.long_side": 1333, "eval.max_bad_share": 0.0, "eval.batch_size": 32,
        "detection.max_boxes": 300, "grounding.max_boxes": 100, "image_text.max_phrases": 8,
        "detection.short_side": (480, 800), "detection.long_side": 1333, "image_text.short_side": (320, 320),
        "image_text.long_side": 320, "detection.flip_prob": 0.5, "image_text.flip_prob": 0.5,
        "detection.max_bad_share": 0.01, "detection.few_shot_seed": 3, "checkpoint.every_steps": 1000,
        "checkpoint.keep": 3, "checkpoint.keep_best": False, "nonfinite": "stop", "seed": 0, "num_steps": 0,
        "mixing": ("proportional", 1.0),
        "timeout_s": 600, "input.timeout_s": 300, "log_every_steps": 50, "pictures_every_steps": 1000,
    }  # fmt: skip
    values = config_lib.flat(c)
    assert {key: values[key] for key in expected} == expected
    assert config_lib.for_chip(c, None).to_dict() == c.to_dict()


# (keys, values at the edge of what is allowed, values beyond it)
EDGES = [
    ("epochs log_every_steps checkpoint.every_steps checkpoint.keep optimizer.patience timeout_s", [1], [0]),
    ("model.text.num_heads model.head.num_groups input.timeout_s", [1], [0]),
    ("detection.max_box_concepts grounding.max_box_concepts", [1, 8], [0]),
    ("loss.class_proposals", [1, 100], [0]),
    ("loss.class_weight image_text.class_weight", [0.0, 3.0], [-0.1]),
    ("mesh.fsdp", [1, 8], [0, 3, 16]),
    ("detection.num_shots optimizer.stop_patience eval.every_steps eval.every_epochs", [0], [-1]),
    ("loss.temperature loss.matching_temperature", [1e-9, 5.0], [0.0, -1.0]),
    ("loss.label_smoothing optimizer.ema_decay", [0.0, 0.999], [1.0, -0.001]),
    ("optimizer.decay_factor", [0.001, 0.999], [0.0, 1.0]),
    ("optimizer.decay_at", [(), (0.001, 0.999)], [(0.0,), (0.5, 1.0), ("a",), 0.5]),
    ("detection.unflippable_words image_text.unflippable_words", [(), ("links",)], [("",), ("a", " "), (3,), "links"]),
    ("eval.drop_categories detection.drop_categories", [(), ("a",)], [("",), (3,)]),
    ("model.text.classes", [(), ("a", "b")], [("",), ("a", "A"), "a", (3,), (("a",),)]),
    ("detection.max_bad_share image_text.max_bad_share eval.max_bad_share", [0.0, 1.0], [-0.1, 1.1, float("nan")]),
    ("optimizer.frozen", ["", "a.*"], ["("]),
    ("init_from.swin init_from.text", ["", "a.safetensors"], ["a.pth", "asafetensors"]),
    ("detection.from_epoch grounding.from_epoch", [0, 2], [-1, 3]),
    ("optimizer.min_learning_rate", [0.0, 0.0999], [-1e-9, 0.1]),
    ("detection.short_side", [(64, 64), (32, 64)], [(64, 32), (0, 64), (64,), 64, ("a", "b")]),
    ("eval.short_side", [1, 64], [0, -1]),
    ("detection.canvases eval.canvases", [((64, 96),), ((32, 32), (64, 96))], [((64, 112),), ((0, 32),), ((32,),)]),
    ("detection.num_scales image_text.num_scales", [0, 1], [-1, 9, 10**12]),
    ("detection.images eval.annotations", ["a", "/a", "gs://bucket/b"], ["hf://a", "https://b"]),
    ("scenes.folder", ["", "a"], ["gs://bucket/b", "hf://a"]),
    ("name closing", ["hf://a"], []),
    ("detection.batch_size image_text.batch_size eval.batch_size", [8, 64], [0, -8, 9]),
    ("optimizer.accumulate.detection", [1], [0, -1, 2]),
    ("model.remat", ["none", "blocks", "blocks_but_attention", "heads", "all"], ["", "some"]),
    (
        "optimizer.text_lengths.detection optimizer.text_lengths.grounding optimizer.text_lengths.image_text",
        [(), ((16, 1.0),), ((16, 0.25), (8, 0.5), (3, 0.25)), [[8, 0.5]]],
        [
            ((17, 0.5),), ((2, 0.5),), ((8.0, 0.5),), ((8, 0.5), (16, 0.25)), ((8, 0.5), (8, 0.25)), (16, 0.5),
            ((16, 0.0),), ((16, -0.5), (8, 0.5)), ((16, 0.5), (8, 0.75)), ((16,),), (("16", 0.5),), "16",
        ],
    ),
    ("optimizer.remat.detection optimizer.remat.grounding optimizer.remat.image_text", ["", "none", "all"], ["some"]),
    ("model.swin.attention_impl", window_attention.IMPLS, ["flash"]),
    ("model.head.deform_impl", deform_conv.IMPLS, ["torch"]),
    ("model.head.objectness", ["none", "classification", "iou"], ["", "centerness"]),
    ("loss.selection", ["text_batch", "text_sample", "centerness"], ["text"]),
    ("loss.matching", ["one_to_one", "one_to_many", "max_size"], ["many_to_many"]),
    ("loss.side", ["text_to_image", "image_to_text", "bilateral"], ["both"]),
    ("optimizer.schedule", ["cosine", "step", "constant"], ["linear"]),
    ("eval.score", detect.SCORES, ["best"]),
    ("eval.monitor", ["AP", "AP50", "fixed_AP"], ["mAP"]),
    ("trackers", [(), ("mlflow",), ("wandb", "mlflow")], [("mlflow", "tensorboard")]),
    ("chips.v4 chips.rtx5090", [(), (("model.remat", "all"),)], [(("modle.remat", "all"),), ("model.remat",)]),
    ("loss.selection_scope", ["device", "global"], ["host"]),
    ("loss.interaction", ["phrases", "tokens"], ["words"]),
    (
        "mixing",
        [("capped", 4), ("temperature", 1e-9), ["proportional", 1.0]],
        [("capped", 0.0), ("capped",), ("equal", 1.0), ("capped", "4"), "capped", ()],
    ),
    ("model.dtype", ["float32", "bfloat16"], ["float16"]),
    ("nonfinite", ["stop", "skip"], ["go on"]),
]  # fmt: skip


def test_a_capped_mixture_wants_boxes_from_the_first_pairs_on(micro):
    micro.epochs, micro.mixing, micro.grounding.from_epoch = 3, ("capped", 1.0), 2
    with pytest.raises(ValueError, match=r"grounding.from_epoch is 2.*at most image_text.from_epoch \(0\)"):
        validation.validate(micro, num_devices=1)
    for changes in (
        {"mixing": ("temperature", 2.0)},
        {"image_text.from_epoch": 2},
        {"grounding.weight": 0.0},
        {"scenes.num_grounding": 0},
        {"image_text.weight": 0.0},
    ):
        config = micro.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        validation.validate(config, num_devices=1)


@pytest.mark.parametrize(("keys", "allowed", "refused"), EDGES, ids=[edges[0].split()[0] for edges in EDGES])
def test_edges_of_what_is_allowed(micro, keys, allowed, refused):
    micro.epochs, micro.optimizer.learning_rate, micro.eval.every_steps = 3, 0.1, 1
    micro.scenes.num_detection = micro.scenes.num_eval = 0  # files may be named in their place
    for name in keys.split():
        *path, last = name.split(".")

        def problem_of(value, path=path, last=last):
            config = micro.copy_and_resolve_references()
            section = functools.reduce(lambda part, key: part[key], path, config)
            with section.ignore_type():
                section[last] = value
            try:
                validation.validate(config, num_devices=8)
            except ValueError as error:
                return str(error)
            return ""

        for value in allowed:
            assert f"config.{name}" not in problem_of(value), value
        for value in refused:
            assert name in problem_of(value), value


def test_heads_of_the_selection_and_the_nearest_batch(micro):
    for selection in ("classification", "iou"):
        for objectness in ("none", "classification", "iou"):
            micro.loss.selection, micro.model.head.objectness = selection, objectness
            if selection == objectness:
                validation.validate(micro, num_devices=8)
            else:
                with pytest.raises(
                    ValueError, match=f"'{selection}' but config.model.head.objectness is '{objectness}'"
                ):
                    validation.validate(micro, num_devices=8)
    micro.eval.every_steps, micro.optimizer.stop_patience, micro.eval.every_epochs = 0, 1, 0
    micro.grounding.batch_size = 22
    with pytest.raises(ValueError, match=r"optimizer\.stop_patience need scores") as error:
        validation.validate(micro, num_devices=8)
    assert "= 8; the nearest that is: 24" in str(error.value)


def test_the_sizes_of_a_canvas_differ(micro):
    micro.grounding.canvases, micro.grounding.short_side = ((96, 96),), (58, 96)
    micro.grounding.num_scales = 2
    validation.validate(micro, num_devices=8)
    micro.grounding.num_scales = 3
    with pytest.raises(ValueError, match=r"^1 problem.*\n.*grounding.num_scales is 3, but in multiples of 32") as error:
        validation.validate(micro, num_devices=8)
    assert "makes (96, 96) to (96, 96), (64, 64), (64, 64); allowed: 0, fewer, or a wider range" in str(error.value)
    assert str(error.value).endswith("config.grounding.short_side, now (58, 96)")


def test_the_largest_box_has_no_token(micro):
    for interaction, matching in itertools.product(("phrases", "tokens"), ("max_size", "one_to_many")):
        micro.loss.interaction, micro.loss.matching = interaction, matching
        if (interaction, matching) == ("tokens", "max_size"):
            with pytest.raises(ValueError, match=r"loss\.matching max_size .* needs config\.loss\.interaction phrases"):
                validation.validate(micro, num_devices=8)
        else:
            validation.validate(micro, num_devices=8)


def test_unknown_names_say_what_is_allowed():
    with pytest.raises(ValueError, match=r"'swin_x' is unknown; allowed are nano, swin_t"):
        config_lib.model("swin_x")
    with pytest.raises(ValueError, match="allowed are o365, o365_cc3m"):
        load("swin_t", "o366")


def test_values_of_the_command_line_win_over_those_of_a_chip(tmp_path):
    file = tmp_path / "small.py"
    file.write_text(
        "from detclipv2_jax import config\n"
        "def get_config():\n"
        "  c = config.base()\n"
        "  c.name = 'small'\n"
        "  c.chips.v5e = (('model.remat', 'all'), ('optimizer.accumulate.detection', 4))\n"
        "  return c\n"
    )
    program = (
        "import sys\nfrom detclipv2_jax import commands, config\n"
        "c = config.for_chip(commands.configuration(sys.argv[1:]), 'v5e')\n"
        "print(c.model.remat, c.optimizer.accumulate.detection)"
    )
    line = [sys.executable, "-c", program, f"--config={file}", "--config.optimizer.accumulate.detection=2"]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout.split() == ["all", "2"]


def test_values_of_a_chip_are_put_into_a_copy_and_their_names_must_be_keys():
    config = config_lib.base()
    config.chips.v4 = (("model.remat", "all"), ("epochs", 3))
    found = config_lib.for_chip(config, "v4")
    assert config_json.differences(config, found) == ["epochs: 12 -> 3", "model.remat: 'blocks' -> 'all'"]
    found.epochs = 4
    found.chips.v4 = (("model.remta", "all"),)
    with pytest.raises(ValueError, match=r"config\.chips\.v4 is .*allowed: \(key, value\) pairs"):
        validation.validate(found, num_devices=32)


def test_differences_are_of_the_keys_of_both():
    one, other = (config_lib.ConfigDict(values) for values in ({"a": 1, "b": {"c": 2}}, {"b": {"c": 3, "d": 4}}))
    assert config_json.differences(one, other) == ["a: 1 -> None", "b.c: 2 -> 3", "b.d: None -> 4"]


def test_a_section_that_was_emptied_is_named():
    config = config_lib.base()
    config.detection = config_lib.ConfigDict()  # --config.detection={}
    with pytest.raises(
        ValueError, match=r"lacks config.detection.annotations, config.detection.batch_size, .*one by one"
    ):
        validation.validate(config, num_devices=1)


def test_pretraining_takes_a_known_variant_of_the_data():
    config = config_lib.base()
    config.name = "x"
    config_lib.pretraining(config)
    assert config.name == "x_full"
    assert (config.grounding.data, config.image_text.data) == config_lib.PRETRAINING["full"]
    with pytest.raises(ValueError, match=r"variant 'all' of configs/x_full\.py is unknown; allowed are .*full"):
        config_lib.pretraining(config, "all")
