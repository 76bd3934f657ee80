"""Checkpoints with the names and shapes of every library: features, the way back, and what is refused."""

import io
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import types
import zipfile

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from detclipv2_jax import convert
from detclipv2_jax.convert import layouts, reading
from detclipv2_jax.data.tokenizer import num_tokens, tokenize
from detclipv2_jax.models.swin import Swin
from detclipv2_jax.models.text_encoder import TextEncoder
from detclipv2_jax.runs import pretrained
from detclipv2_jax.runs.optimizer import named_shapes

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import cases  # noqa: E402  (lives beside the fixtures, which are made in another environment)
import seeded  # noqa: E402

NAMES = json.loads((GOLDEN / "layouts.json").read_text())  # of real models of the libraries
BLOCK = re.compile(r"layers\.0\.blocks\.0\.(?!.*(relative_position_index|attn_mask))")
EVERY = [(part, layout) for part in NAMES for layout in NAMES[part]]


def checkpoint(part, layout):
    """Returns the weights that `make_fixtures.py` gave to the library's model."""
    dtype = np.float16 if layout == "openai" else np.float32  # as OpenAI's files
    return {name: seeded.foreign(name, shape).astype(dtype) for name, shape in NAMES[part][layout].items()}


def converted(part, content, folder):
    """Returns (report, path) of a converted checkpoint."""
    save_file(content, folder / "theirs.safetensors")
    report = convert.run(part, input=folder / "theirs.safetensors", output=folder / "ours.safetensors")
    return report, folder / "ours.safetensors"


def load(path, part, model, *inputs, **options):
    """Returns the variables of a model with the parameters of a file; fresh ones are seeded."""
    root = pretrained.ROOTS[part]
    shapes = jax.eval_shape(lambda key: {root: model.init(key, *inputs, **options)["params"]}, jax.random.key(0))
    params, _ = pretrained.load(path, root, named_shapes(shapes))

    def value(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return params[name] if name in params else seeded.parameter(name, leaf.shape)

    return {"params": jax.tree_util.tree_map_with_path(value, shapes)[root]}


SWIN = Swin(**cases.LAYOUT_SWIN._asdict())
SWIN_FEATURES = jax.jit(lambda variables, image: SWIN.apply(variables, image, train=False))
TEXT = TextEncoder(*cases.LAYOUT_TEXT[:3], context_length=16, embed_dim=cases.LAYOUT_TEXT[3])
TEXT_EMBEDDINGS = jax.jit(TEXT.apply)


@pytest.mark.parametrize(
    ("part", "layout"),
    [pytest.param(part, layout, marks=[pytest.mark.slow] * (part == "swin")) for part, layout in EVERY],
)
def test_features_of_a_converted_checkpoint_are_the_librarys(part, layout, tmp_path):
    golden = np.load(GOLDEN / "layouts.npz")
    report, path = converted(part, checkpoint(part, layout), tmp_path)
    named = {"open_clip": "openai", "open_clip_custom": "openai"}.get(layout, layout)  # the same names
    assert report.startswith(f"{part} in the layout {named}: ")
    if part == "clip_text":
        variables = load(path, part, TEXT, cases.text_tokens())
        embeddings = TEXT_EMBEDDINGS(variables, cases.text_tokens())
        np.testing.assert_allclose(embeddings, golden[f"clip_text/{layout}"], atol=1e-5)
        return
    image = seeded.uniform("image", (1, *cases.LAYOUT_CANVAS, 3))
    variables = load(path, part, SWIN, image, train=False)
    for stage, feature in enumerate(SWIN_FEATURES(variables, image), start=2):
        expected = golden[f"swin/{layout}/stage{stage}"]
        np.testing.assert_allclose(seeded.sample(feature), expected, atol=2e-4 * expected.std())


@pytest.mark.parametrize(("part", "layout"), EVERY)
def test_the_way_back_is_exact(part, layout, tmp_path):
    theirs = checkpoint(part, layout)
    report, ours = converted(part, theirs, tmp_path)
    output = tmp_path / "back.safetensors"
    convert.run(part, input=ours, output=output, layout=layout.removesuffix("_custom"))
    theirs = {re.sub(r"^(text|swin)\.", "", name): value for name, value in theirs.items()}
    back = load_file(output)
    for name, value in back.items():
        assert (value.dtype, value.shape, value.tobytes()) == (
            theirs[name].dtype, theirs[name].shape, theirs[name].tobytes()
        ), name  # fmt: skip
    beyond = {re.sub(r"\d+", "*", name) for name in theirs.keys() - back.keys()}
    left_out = next((line for line in report.splitlines() if line.startswith("left out: ")), "left out: ")
    assert beyond == {re.sub(r"^(text|swin)\.| \(\d+\)$", "", kind) for kind in left_out[10:].split(", ") if kind}
    for word in beyond:
        assert re.match(r"(head|classifier|norm|layernorm|visual|vision|logit_scale|input_|context_|vocab_)", word) or (
            word.endswith(("relative_position_index", "attn_mask"))
        ), word


def test_the_file_says_what_it_is(tmp_path):
    import hashlib

    report, path = converted("swin", checkpoint("swin", "timm"), tmp_path)
    source = (tmp_path / "theirs.safetensors").read_bytes()
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {
            "format": "detclipv2_jax",
            "layout": "timm",
            "source": "theirs.safetensors",
            "source_sha256": hashlib.sha256(source).hexdigest(),
            "source_bytes": str(len(source)),
        }
    first, *_, fresh, _ = report.splitlines()
    ours = load_file(path)
    assert (
        first == f"swin in the layout timm: {len(ours)} arrays, {sum(x.size for x in ours.values()):,} numbers, {path}"
    )
    assert fresh.endswith("they start fresh: " + ", ".join(pretrained.FRESH))
    assert report.endswith(f'put in the config: config.init_from.swin = "{path}"')
    assert sorted(x.name for x in tmp_path.iterdir()) == ["ours.safetensors", "theirs.safetensors"]


def test_what_a_tower_does_not_hold_is_left_out_and_counted(tmp_path):
    zeros = np.zeros(3, np.float32)
    more = dict.fromkeys(("logit_bias", "visual.0.weight", "visual.1.weight", "visual_projection.weight"), zeros)
    report, path = converted("clip_text", checkpoint("clip_text", "transformers") | more, tmp_path)
    lines = report.splitlines()
    assert "visual.*.weight (2)" in lines[1]
    assert "logit_bias (1)" in lines[1]
    assert lines[2:] == [f'put in the config: config.init_from.text = "{path}"']  # nothing starts fresh
    _, path = converted("swin", checkpoint("swin", "timm"), tmp_path)
    save_file(
        load_file(path) | dict.fromkeys((*pretrained.FRESH, "head/kernel"), zeros), tmp_path / "whole.safetensors"
    )
    outputs = []
    for source in (path, tmp_path / "whole.safetensors"):
        outputs.append(tmp_path / f"back_{source.stem}.safetensors")
        report = convert.run("swin", input=source, output=outputs[-1], layout="timm")
    (line,) = report.splitlines()[1:]
    left_out = set(line.removeprefix("left out: ").split(", "))
    assert left_out == {"head/kernel (1)", "swin/norm*/bias (3)", "swin/norm*/scale (3)"}
    before, after = (load_file(output) for output in outputs)
    assert before.keys() == after.keys()
    with safe_open(outputs[0], framework="np") as file:
        assert (file.metadata()["format"], file.metadata()["layout"]) == ("pt", "timm")


@pytest.mark.parametrize("prefix", ["module.", "model.", "state_dict.model.", "module.backbone.", "text_model."])
def test_wrappers_before_names_are_recognised(prefix, tmp_path):
    part, layout = ("clip_text", "transformers") if prefix == "text_model." else ("swin", "torchvision")
    plain = checkpoint(part, layout)
    _, path = converted(part, plain, tmp_path)
    expected = load_file(path)
    _, path = converted(part, {prefix + name: value for name, value in plain.items()}, tmp_path)
    wrapped = load_file(path)
    assert wrapped.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(wrapped[name], value)


def broken(part, layout, **changes):
    """Returns a checkpoint with `drop`ped, `add`ed and `cut` names."""
    content = checkpoint(part, layout)
    for name in changes.get("drop", ()):
        del content[name]
    for name in changes.get("cut", ()):
        content[name] = content[name][:-1].copy()
    return content | {name: np.zeros(3, np.float32) for name in changes.get("add", ())}


@pytest.mark.parametrize(
    ("part", "content", "messages"),
    [
        (
            "swin",
            lambda: broken(
                "swin", "timm", drop=["layers.2.blocks.0.mlp.fc1.bias"], add=["layers.0.blocks.0.attn.logit_scale"],
                cut=["layers.1.blocks.1.attn.qkv.weight", "patch_embed.norm.bias"],
            ),
            [
                r"no complete swin \(nearest known layout: timm, 77 of 78 names\)",
                r"missing \(1\): layers.2.blocks.0.mlp.fc1.bias\n",
                r"unexpected \(1\): layers.0.blocks.0.attn.logit_scale\n",
                r"reshaped \(2\): layers.1.blocks.1.attn.qkv.weight \(47, 16\) -> \(48, 16\), patch_embed.norm.bias",
            ],
        ),
        (
            "swin",
            lambda: broken("swin", "transformers", drop=["swin.encoder.layers.1.blocks.0.attention.self.key.bias"]),
            ["layout: transformers,", r"missing \(1\): encoder.layers.1.blocks.0.attention.self.key.bias"],
        ),
        (
            "swin",  # a stage without blocks
            lambda: broken("swin", "timm", drop=[name for name in NAMES["swin"]["timm"] if BLOCK.match(name)]),
            [r"missing \(13\): layers.0.blocks.0.attn.proj.bias, layers.0.blocks.0.attn.proj.weight,"],
        ),
        (
            "clip_text",
            lambda: broken("clip_text", "transformers", drop=["text_projection.weight"]),
            ["layout: transformers,", r"missing \(1\): text_projection.weight"],
        ),
        (
            "clip_text",
            lambda: broken("clip_text", "openai", cut=["token_embedding.weight"]),
            [r"reshaped \(1\): token_embedding.weight \(49407, 64\) -> \(49408, 64\)"],
        ),
        ("swin", lambda: checkpoint("clip_text", "open_clip"), ["holds no swin but clip_text in the layout openai"]),
        ("swin", lambda: {"layer1.0.conv1.weight": np.zeros((2, 2), np.float32)}, ["not one of its 1 names", "timm"]),
        (
            "swin",
            lambda: broken("swin", "timm", add=["module.norm.weight"]),
            ["holds several models: .*norm.weight is there under another prefix too"],
        ),
    ],
)  # fmt: skip
def test_what_is_not_one_whole_tower_is_refused(part, content, messages, tmp_path):
    with pytest.raises(ValueError, match=r"theirs\.safetensors") as error:
        converted(part, content(), tmp_path)
    for message in messages:
        assert re.search(message, str(error.value)), str(error.value)
    assert not (tmp_path / "ours.safetensors").exists()


def test_wrong_arguments(tmp_path):
    _, ours = converted("swin", checkpoint("swin", "timm"), tmp_path)
    theirs, output = tmp_path / "theirs.safetensors", tmp_path / "out.safetensors"
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    for part, options, message in (
        ("text", {}, "PART is 'text'; allowed are swin, clip_text"),
        ("swin", {"input": tmp_path / "nowhere.pth"}, "is no file"),
        ("swin", {"output": tmp_path / "out.npz"}, "only .safetensors files are written"),
        ("swin", {"input": tmp_path / "broken.safetensors"}, "cannot be read"),
        ("swin", {"input": tmp_path / "model.onnx"}, "allowed are .safetensors, .pth, .pt and .bin"),
        ("swin", {"input": ours}, "has our names already; --layout"),
        ("swin", {"layout": "timm"}, "for the way back, but .* has no parameter named swin/"),
        ("swin", {"input": ours, "layout": "tim"}, "'tim' is unknown; allowed for swin: microsoft, timm"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.run(part, **{"input": theirs, "output": output} | options)
    content = load_file(ours)
    del content["swin/patch_norm/bias"]
    save_file(content, ours)
    with pytest.raises(ValueError, match=r"missing \(1\): swin/patch_norm/bias"):
        convert.run("swin", input=ours, output=output, layout="timm")


# --- pickles


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_pickle(path, content):
    """Writes what torch.save does: a zip archive with a pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


class FakeTensor:
    """The part of torch.Tensor that is used."""

    def __init__(self, array, dtype="float32"):
        self.array, self.dtype = array, dtype

    def float(self):
        return FakeTensor(np.float32(self.array))

    def numpy(self):
        assert self.dtype != "bfloat16", "NumPy has no bfloat16"
        return self.array


def fake_torch(monkeypatch, content):
    """Installs a torch whose `load` returns `content`, or without it refuses pickles unless they may run code."""

    def load(path, *, map_location, weights_only=False):
        if content is not None:
            return content
        if not weights_only:
            with zipfile.ZipFile(path) as archive:
                return pickle.load(io.BytesIO(archive.read("archive/data.pkl")))
        raise pickle.UnpicklingError("Weights only load failed.\nmore")

    module = types.SimpleNamespace(load=load, Tensor=FakeTensor, bfloat16="bfloat16")
    monkeypatch.setitem(sys.modules, "torch", module)


@pytest.mark.parametrize("ending", ["pth", "pt", "bin"])
@pytest.mark.parametrize("torch", ["absent", "stand-in", "real"])
def test_code_in_a_pickle_is_never_run(torch, ending, tmp_path, monkeypatch):
    path, trap = tmp_path / f"model.{ending}", tmp_path / "sprung"
    write_pickle(path, {"model": Trap(trap)})
    if torch == "absent":
        monkeypatch.setitem(sys.modules, "torch", None)
    elif torch == "stand-in":
        fake_torch(monkeypatch, None)
    else:
        pytest.importorskip("torch", reason="needs PyTorch, which neither the project nor its tests install")
    message = "pip install torch.*it was not opened" if torch == "absent" else r"nothing in it was run \("
    if torch == "stand-in":
        message += r"Weights only load failed\.\)"  # not the advice to run it
    with pytest.raises(ValueError, match=message):
        convert.run("swin", input=path, output=tmp_path / "ours.safetensors")
    assert not trap.exists()
    with zipfile.ZipFile(path) as archive:  # the trap works
        pickle.loads(archive.read("archive/data.pkl"))
    assert trap.exists()


@pytest.mark.parametrize("wrappers", [(), ("model",), ("state_dict",), ("module", "model"), ("model_state_dict",)])
def test_weights_of_a_pickle(wrappers, tmp_path, monkeypatch):
    plain = checkpoint("swin", "microsoft")
    content = {name: FakeTensor(value) for name, value in plain.items()}
    content["norm.weight"].dtype = "bfloat16"
    for wrapper in wrappers:
        content = {wrapper: content, "epoch": 300}
    fake_torch(monkeypatch, content)
    (tmp_path / "swin.pth").write_bytes(b"")
    convert.run("swin", input=tmp_path / "swin.pth", output=tmp_path / "a.safetensors")
    _, path = converted("swin", plain, tmp_path)
    for name, value in load_file(path).items():
        np.testing.assert_array_equal(load_file(tmp_path / "a.safetensors")[name], value)


def test_types_that_numpy_has_stay(tmp_path, monkeypatch):
    given = {"half": FakeTensor(np.ones(2, np.float16), "float16"), "brain": FakeTensor(np.ones(2), "bfloat16")}
    fake_torch(monkeypatch, given)
    (tmp_path / "a.pth").write_bytes(b"")
    found = reading.read(tmp_path / "a.pth")
    assert {name: array.dtype.name for name, array in found.items()} == {"half": "float16", "brain": "float32"}
    kinds = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)] + ["float16", "float32", "float64"]
    given = {kind: np.array([0, 1, 77], kind) for kind in [*kinds, "bool"]}
    save_file(given, tmp_path / "a.safetensors")
    for kind, array in reading.read(tmp_path / "a.safetensors").items():
        assert array.dtype.name == kind
        np.testing.assert_array_equal(array, given[kind])


@pytest.mark.parametrize(
    ("content", "message"),
    [([1], "holds a list, not weights"), ({"model": {"epoch": 3}}, "no weights under epoch; save the weights alone")],
)
def test_pickles_without_weights(content, message, tmp_path, monkeypatch):
    fake_torch(monkeypatch, content)
    (tmp_path / "swin.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        convert.run("swin", input=tmp_path / "swin.pth", output=tmp_path / "a.safetensors")


# --- the command


def command(*arguments):
    """Returns the finished command."""
    arguments = [sys.executable, "-m", "detclipv2_jax.convert", *map(str, arguments)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def test_command(tmp_path):
    source, output = tmp_path / "theirs.safetensors", tmp_path / "new" / "ours.safetensors"
    save_file(checkpoint("swin", "timm"), source)
    done = command("swin", f"--input={source}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f'put in the config: config.init_from.swin = "{output}"'
    assert output.exists()
    failed = command("clip_text", f"--input={source}", f"--output={output}")
    assert failed.returncode != 0
    assert failed.stderr.startswith("error: ")
    shown = command("--help").stdout
    for word in ("swin", "clip_text", "--input", "--output", "--layout", "init_from", "microsoft", "open_clip"):
        assert word in shown, word


# --- real weights


def test_real_clip_embeds_names_as_clip_does(shared_data, tmp_path):
    """Every "a {name}" of COCO and LVIS: cosine of at least 0.999 to CLIP ViT-B/32's embedding.

    The stored embeddings are float16 and were computed in it; ours are float32. Rows are in the order of the category
    ids; LVIS's names went in with their underscores. Names that lose their end at 16 tokens are left out.
    """
    source = os.environ.get("DETCLIP_CLIP_CHECKPOINT")
    if not source:
        pytest.skip("needs CLIP ViT-B/32, in any known layout: set DETCLIP_CLIP_CHECKPOINT to its path")
    convert.run("clip_text", input=source, output=tmp_path / "ours.safetensors")
    model = TextEncoder(512, 12, 8, context_length=16, embed_dim=512)
    variables = load(tmp_path / "ours.safetensors", "clip_text", model, cases.text_tokens())
    embed = jax.jit(model.apply)
    folder = shared_data / "categories"
    lvis = json.loads((folder / "lvis_v1_categories.json").read_text())
    coco = json.loads((shared_data / "coco_train" / "instances.json").read_text())["categories"]
    for categories, file in ((lvis, "lvis_v1_clip_a+cname.npy"), (coco, "coco_clip_a+cname.npy")):
        texts = [f"a {category['name']}" for category in sorted(categories, key=lambda category: category["id"])]
        whole = num_tokens(texts) <= 16
        assert whole.mean() > 0.95
        ours = np.concatenate([embed(variables, tokens) for tokens in np.array_split(tokenize(texts), 8)])
        theirs = np.load(folder / file).astype(np.float32)
        cosine = np.sum(ours * theirs, axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        assert cosine[whole].min() >= 0.999, np.array(texts)[whole][cosine[whole].argmin()]


def test_a_text_tower_is_expected_as_deep_as_its_names():
    whole = layouts.text_shapes(8, 3, positions=5, embed_dim=4)
    names = [name for name in whole if "block2/mlp_out" not in name or name.endswith("bias")]  # one is missing
    assert layouts._expected("clip_text", names, {name: whole[name] for name in names}) == whole


@pytest.mark.parametrize(
    ("part", "shapes", "layout"),
    [
        ("swin", layouts.swin_shapes(2, (1, 1, 18, 1), [(9, 1), (9, 2), (9, 4), (9, 8)]), "transformers"),
        ("clip_text", layouts.text_shapes(2, 24, positions=7, embed_dim=3), "openai"),
    ],
)
def test_towers_as_deep_as_the_largest_that_are_published(part, shapes, layout):
    rng = np.random.default_rng(0)
    ours = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    theirs = layouts.to_checkpoint(part, ours, layout=layout, what="it").params
    found = layouts.from_checkpoint(part, theirs, what="it")
    assert (found.layout, found.left_out, found.params.keys()) == (layout, [], ours.keys())
    for name, value in ours.items():
        np.testing.assert_array_equal(found.params[name], value)
