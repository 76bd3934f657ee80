"""Figures are rendered and looked at: boxes and labels where they belong, nothing empty, files written."""

import json

import numpy as np
import pytest
from PIL import Image

from detclipv2_jax import commands
from detclipv2_jax.colors import PALETTE, color_of, nth_color
from detclipv2_jax.data import phrases, tokenizer
from detclipv2_jax.data.schema import Batch, Kind
from detclipv2_jax.inference import Predictor
from detclipv2_jax.visualize import __main__ as command
from detclipv2_jax.visualize import alignment, charts, drawing, figures

NAMES = ("cat", "dog", "a very long name of a thing")


def _photo(height=120, width=180):
    return np.random.default_rng(0).integers(90, 160, (height, width, 3), dtype=np.uint8)


def _has(picture, color):
    return (np.asarray(picture) == np.array(color)).all(-1)


def test_photo_draws_boxes_where_they_are():
    image = np.full((300, 450, 3), 128, np.uint8)
    box = np.array([[90.0, 60.0, 225.0, 240.0]])
    picture = drawing.photo(image, box, [""], [PALETTE[0]], long_side=900)
    assert picture.shape == (600, 900, 3)
    rows, columns = np.nonzero(_has(picture, PALETTE[0]))
    assert abs(rows.min() - 120) <= 1
    assert abs(rows.max() - 480) <= 1
    assert abs(columns.min() - 180) <= 1
    assert abs(columns.max() - 450) <= 1
    assert not _has(picture, PALETTE[0])[140:460, 200:430].any()  # an outline


def test_colours_of_a_series_come_again_darker():
    assert [nth_color(i) for i in (0, 6, 7, 14, 21)] == [
        PALETTE[0], PALETTE[6], (0, 68, 107), (0, 41, 64), PALETTE[0]
    ]  # fmt: skip


def test_a_name_has_one_colour_and_names_have_many():
    colors = [nth_color(i) for i in range(3 * len(PALETTE))]
    assert len(set(colors)) == len(colors)
    assert len({color_of(name) for name in ("sea star", "Sea_star", "sea-star", "sea star , an animal")}) == 1
    names = [f"{color} {thing}" for color in ("red", "blue", "grün", "黄") for thing in ("car", "house", "猫", "बिल्ली")]
    assert len({color_of(name) for name in names}) == len(names)
    expected = {
        "cat": (148, 165, 13),
        "red car": (87, 165, 13),
        "日本": (19, 236, 231),
    }  # those of pictures that were drawn before
    assert {name: color_of(name) for name in expected} == expected
    assert color_of(",a") != color_of(",b")
    assert color_of("red star") == color_of(tokenizer.decode(tokenizer.tokenize(["red star"]))[0])


def test_detections_show_boxes_scores_and_legend(tmp_path):
    boxes = np.array([[10, 10, 60, 60], [80, 20, 150, 100], [0, 0, 5, 5]], np.float32)
    labels, scores = np.array([1, 2, 0]), np.array([0.9, 0.4, 0.1])
    path = tmp_path / "pictures" / "found.png"
    picture = figures.detections(
        _photo(), boxes, labels, NAMES, scores=scores, min_score=0.3, title="photo.jpg", path=path
    )
    with Image.open(path) as stored:
        np.testing.assert_array_equal(np.asarray(stored), picture)
    height = 600 + 2 * drawing.MARGIN_PX
    assert picture.shape[0] > height
    assert picture.shape[1] == 900 + 2 * drawing.MARGIN_PX
    legend = picture[-50:]
    for color in map(color_of, NAMES[1:]):
        assert _has(picture[:-50], color).any()
        assert _has(legend, color).sum() > 100
    assert not _has(picture, color_of(NAMES[0])).any()  # below min_score


def test_a_place_is_shown_once_with_its_best_word():
    boxes = np.array([[10, 10, 60, 60], [12, 10, 60, 60], [80, 20, 150, 100], [10, 10, 60, 30]], np.float32)
    labels, names, scores = np.arange(4), [*NAMES, "flower"], np.array([0.9, 0.8, 0.7, 0.6])

    def num_colors(**options):
        picture = figures.detections(_photo(), boxes, labels, names, **options)
        return sum(bool(_has(picture, color).any()) for color in map(color_of, names))

    assert num_colors(scores=scores) == 3  # the second lies on the first; the last covers a part of it
    assert num_colors(scores=scores, max_drawn=2) == 2
    assert num_colors(scores=scores, max_iou=0.3) == 2
    assert num_colors(scores=scores, max_iou=1.0) == 4
    assert num_colors() == 4  # annotated boxes


def test_detections_beside_the_truth():
    boxes, labels = np.array([[10, 10, 60, 60]], np.float32), np.array([1])
    alone = figures.detections(_photo(), boxes, labels, NAMES, scores=np.array([0.5]))
    both = figures.detections(_photo(), boxes, labels, NAMES, scores=np.array([0.5]), truth=(boxes, labels))
    assert both.shape[1] > 1.9 * alone.shape[1]
    halves = np.array_split(_has(both, color_of("dog"))[:-60], 2, axis=1)
    assert all(half.any() for half in halves)


@pytest.mark.parametrize(
    ("num", "note"),
    [(0, "nothing found"), (5, "nothing scored 0.80 or more; the best 3 of 5")],
)
def test_detections_without_any(num, note, monkeypatch):
    texts = []
    block = drawing.text_block
    monkeypatch.setattr(drawing, "text_block", lambda text, **options: texts.append(text) or block(text, **options))
    boxes = np.array([[10.0 + 30 * i, 10, 30 + 30 * i, 60] for i in range(num)]).reshape(-1, 4)
    names = [*NAMES, "flower", "boat"]
    picture = figures.detections(
        _photo(), boxes, np.arange(num), names, scores=np.linspace(0.5, 0.4, num), min_score=0.8
    )
    assert texts[0] == note
    assert picture.std() > 5
    drawn = [bool(_has(picture, color_of(name)).any()) for name in names]
    assert drawn == [True] * min(num, 3) + [False] * (5 - min(num, 3))  # with their scores


def _batch(kind, *, canvas=(96, 128)):
    b, n, m = 3, 4, 3
    texts = ["a red cat", "dog", "tree", "a photo of a red cat", "café"]
    boxes = np.zeros((b, n, 4), np.float32)
    boxes[:, 0], boxes[:, 1] = [10, 10, 40, 50], [30, 20, 70, 60]
    captions = kind is Kind.IMAGE_TEXT
    return Batch(
        image=np.random.default_rng(0).integers(80, 170, (b, *canvas, 3), dtype=np.uint8),
        extent=np.array([[96, 100], [70, 128], [96, 128]], np.int32),
        scale=np.ones((b, 2), np.float32),
        original_size=np.array([[192, 200], [140, 256], [96, 128]], np.int32),
        image_mask=np.ones(b, bool),
        example_id=np.arange(b, dtype=np.int32),
        boxes=boxes[:, : 0 if captions else n],
        box_mask=np.tile([True, True, False, False], (b, 1))[:, : 0 if captions else n],
        box_concepts=np.tile([0, 1, 0, 0], (b, 1))[:, : 0 if captions else n],
        concept_tokens=np.concatenate([tokenizer.tokenize(texts), np.zeros((3, 16), np.int32)]),
        concept_mask=np.arange(8) < 5,
        concept_ids=np.zeros((8, 2), np.uint32),
        caption_concepts=np.tile([3, 0, 1], (b, 1))[:, : m if captions else 0],
        caption_mask=np.tile([True, True, False], (b, 1))[:, : m if captions else 0],
    )


@pytest.mark.parametrize("kind", list(Kind))
def test_contact_sheet_says_what_a_batch_holds(kind, tmp_path, monkeypatch):
    texts = []
    block = drawing.text_block
    monkeypatch.setattr(drawing, "text_block", lambda text, **options: texts.append(text) or block(text, **options))
    picture = figures.training_batch(_batch(kind), kind=kind, max_images=2, path=tmp_path / "batch.png")
    assert (tmp_path / "batch.png").stat().st_size > 1000
    *cells, heading, footer = texts
    filled = (
        "5 of 8 concepts, 6 of 9 captions and phrases" if kind is Kind.IMAGE_TEXT else "6 of 12 boxes, 5 of 8 concepts"
    )
    assert heading == (
        f"{kind.value}: 2 of 3 images on 96×128 canvases (hatched: padding); of the padded arrays hold data: "
        f"3 of 3 images, {filled}"
    )
    assert len(cells) == 2
    assert cells[0].startswith("example 0: 192×200 px as 96×100\n")
    if kind is Kind.IMAGE_TEXT:
        assert cells[0].endswith("“a photo of a red cat”\n· a red cat")
        assert footer == "5 concepts in the table: 2 of images, 3 negatives\nnegatives: dog | tree | café"
    else:
        assert cells[0].endswith("2 boxes, 2 concepts")
        assert "negatives: tree | a photo of a red cat | café" in footer
        assert _has(picture, color_of("a red cat")).any()
        assert _has(picture, color_of("dog")).any()


def test_padding_is_hatched():
    image = np.full((40, 60, 3), 7, np.uint8)
    hatched = drawing.hatch_padding(image, np.array([30, 50]))
    assert (hatched[:30, :50] == 7).all()
    assert set(np.unique(hatched[30:])) == set(np.unique(hatched[:, 50:])) == {200, 225}


def test_alignment_shows_region_and_map_of_every_phrase(tmp_path):
    phrases = ["a red car", "the sky"]
    boxes = np.array([[20, 60, 90, 110], [0, 0, 180, 40]], np.float32)
    maps = np.zeros((2, 15, 22), np.float32)
    maps[0, 10, 6], maps[1, 2] = 9.0, 5.0
    picture = figures.alignment(
        _photo(),
        phrases,
        boxes,
        scores=np.array([9.0, 5.0]),
        ranks=np.array([1, 2]),
        num_images=4,
        maps=maps,
        caption="a red car under the sky",
        path=tmp_path / "align.png",
    )
    assert (tmp_path / "align.png").exists()
    thirds = [picture[:, i : i + 452] for i in (12, 464, 916)]
    assert [_has(part, color_of(phrases[0])).any() for part in thirds] == [True, True, False]
    assert [_has(part, color_of(phrases[1])).any() for part in thirds] == [True, False, True]
    heat = drawing.heat(np.full((120, 180, 3), 128, np.uint8), maps[0], low=0.0, high=9.0).astype(int)
    assert heat[84, 52].sum() > heat[20, 150].sum() + 100  # bright where it is similar


def test_curves_have_a_panel_a_quantity(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": step, f"{kind}/loss": 1.0 / step, f"{kind}/empty": None}
        for step, kind in zip(range(1, 41), ["detection", "image_text"] * 20, strict=True)
    ]
    rows += [{"step": step, "detection/num_cut": 0.0} for step in (1, 3)]  # never changes: not drawn
    rows += [{"step": 40, "eval/AP": 0.1, "eval/AP50": 0.2}, {"step": 40, "eval/AP": 0.3}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    series = charts.read_metrics(path)
    assert series["detection/loss"][0].tolist() == list(range(1, 41, 2))
    assert series["eval/AP"][1].tolist() == [0.3]  # the later of two
    assert "detection/empty" not in series
    picture = charts.curves(path, path=tmp_path / "curves.png")
    only = charts.curves(path, names=["loss"])
    assert picture.shape[1] == 2 * 420
    assert only.shape[1] == 420
    for color in (PALETTE[0], PALETTE[2]):  # detection and image_text, wherever others are
        assert _has(only, color).sum() > 50
        assert not _has(only, PALETTE[3]).any()
    bars = _has(picture, PALETTE[3])[:, 420:].sum(axis=1)  # scores of a single evaluation, right of the losses
    assert bars.max() / np.median(bars[bars > 0][-20:]) == pytest.approx(0.3 / 0.2, rel=0.05)
    assert charts.curves(path, names=["num_cut"]).shape[1] == 420
    with pytest.raises(ValueError, match=r"has no loss_x; it has AP, AP50, loss, num_cut"):
        charts.curves(path, names=["loss_x"])


def _panel_titles(monkeypatch, path, **options):
    figures = []
    monkeypatch.setattr(charts, "render", lambda figure, path: figures.append(figure))
    charts.curves(path, **options)
    return {axes.get_title(): axes for axes in figures[0].axes if axes.get_title()}


def test_what_matters_most_comes_first_and_scores_are_in_percent(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": step, "timing/images_per_second": 10.0 - step, "detection/grad_norm": step, "eval/top1": 0.1 * step,
         "timing/step_seconds": 20.0 if step == 1 else 0.2 + step / 1000, "detection/loss_box": 1 / step,
         "eval/AP": 0.2 * step, "eval/APc": -1, "forgetting/before/AR@300": 0.25,
         "eval/fixed_AP": 0.3, "eval/AR@300": 0.5}
        for step in range(1, 101)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    panels = _panel_titles(monkeypatch, path)
    expected = ["loss_box", "scores (%)", "AP (%)", "top1 (%)", "images_per_second", "step_seconds", "grad_norm"]
    assert sorted(panels) == sorted(expected)
    places = {title: axes.get_subplotspec().num1 for title, axes in panels.items()}
    assert sorted(places, key=places.get) == expected
    assert panels["AP (%)"].lines[0].get_ydata()[1] == pytest.approx(40)
    low, high = panels["step_seconds"].get_ylim()
    assert low == 0 < high < 1  # the first step compiles
    assert panels["loss_box"].get_ylim()[1] > 0.9
    scores = panels["scores (%)"]
    labels = [text.get_text() for text in scores.get_yticklabels()]
    assert dict(zip(labels, (bar.get_width() for bar in scores.patches), strict=True)) == {
        "AR@300": pytest.approx(50), "AR@300 forgetting/before": pytest.approx(25)
    }  # fmt: skip
    assert len({bar.get_facecolor() for bar in scores.patches}) == 2
    chosen = _panel_titles(monkeypatch, path, names=["AR@300", "loss_box"])
    assert {title: len(axes.patches) for title, axes in chosen.items()} == {"scores (%)": 2, "loss_box": 0}


@pytest.mark.parametrize("content", [None, "", "[1]\n", "{\n", '{"loss": 1}\n'])
def test_curves_of_something_else(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl (is no metrics\.jsonl|holds no metrics yet)"):
        charts.curves(path)


def _command(*arguments):
    kinds = {"detections": command.detections, "alignment": command.alignment, "curves": command.curves}
    return commands.run(kinds, arguments=list(map(str, arguments)))


def test_detections_are_drawn_from_files(tmp_path, capsys):
    """Results that name words and photos, and results of an evaluation with its annotations."""
    Image.fromarray(_photo()).save(tmp_path / "a.png")
    rows = [
        {"image_id": 7, "category_id": 3, "bbox": [10, 20, 60, 50], "score": score, "name": "cat", "file_name": "a.png"}
        for score in (0.1, 0.9)
    ]
    (tmp_path / "found.json").write_text(json.dumps(rows))
    options = (
        "detections",
        "--detections",
        tmp_path / "found.json",
        "--images",
        tmp_path,
        "--output",
        tmp_path / "out",
    )
    assert _command(*options) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "a.jpg")
    alone = np.asarray(Image.open(tmp_path / "out" / "a.jpg"))
    (tmp_path / "found.json").write_text(json.dumps([{k: row[k] for k in list(row)[:4]} for row in rows]))
    assert _command(*options) == 1
    assert "it has no 'name'); give the --annotations it was made on" in capsys.readouterr().err
    truth = {
        "images": [{"id": 7, "file_name": "a.png", "height": 120, "width": 180}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 2, "bbox": [100, 20, 60, 50]}],
        "categories": [{"id": 2, "name": "wild_dog"}, {"id": 3, "name": "cat"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    assert _command(*options, "--annotations", tmp_path / "truth.json") == 0
    assert np.asarray(Image.open(tmp_path / "out" / "a.jpg")).shape[1] > 1.8 * alone.shape[1]  # two photos
    assert _command(*options, "--annotations", tmp_path / "absent.json") == 1
    assert "absent.json" in capsys.readouterr().err


def test_predicted_rows_meet_annotations_by_file_and_word(tmp_path, monkeypatch):
    """`predict` numbers photos and words from 1; the annotations have the same numbers for others."""
    Image.fromarray(_photo()).save(tmp_path / "a.png")
    Image.fromarray(_photo()).save(tmp_path / "b.png")
    row = {
        "image_id": 1,
        "category_id": 1,
        "bbox": [10, 20, 60, 50],
        "score": 0.9,
        "name": "cat",
        "file_name": "x/b.png",
    }
    (tmp_path / "found.json").write_text(json.dumps([row, row | {"category_id": 2, "name": "owl"}]))
    truth = {
        "images": [
            {"id": i + 1, "file_name": name, "height": 120, "width": 180} for i, name in enumerate(("a.png", "b.png"))
        ],
        "annotations": [],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    drawn = {}
    monkeypatch.setattr(
        figures, "detections",
        lambda image, boxes, labels, names, *, title, **options: drawn.update({title: [names[i] for i in labels]}),
    )  # fmt: skip
    options = (
        "detections",
        "--detections",
        tmp_path / "found.json",
        "--images",
        tmp_path,
        "--output",
        tmp_path / "out",
    )
    assert _command(*options, "--annotations", tmp_path / "truth.json") == 0
    assert drawn == {"a.png": [], "b.png": ["cat", "owl"]}


def test_alignment_takes_caption_and_phrases(tmp_path, monkeypatch):
    for name in "abc":
        Image.fromarray(_photo()).save(tmp_path / f"{name}.png")
    drawn = {}
    monkeypatch.setattr(Predictor, "from_checkpoint", lambda workdir: f"predictor of {workdir}")
    monkeypatch.setattr(alignment, "draw", lambda *arguments, **options: drawn.update(options, arguments=arguments))
    options = ("alignment", "--checkpoint=run", "--image", tmp_path / "b.png", "--caption", "a cat on a red car")
    options += ("--others", tmp_path / "*.png", "--output", tmp_path / "out.png")
    assert _command(*options, "--phrases", "a cat, red car,") == 0
    photos = [str(tmp_path / f"{name}.png") for name in "bac"]
    assert drawn["arguments"] == ("predictor of run", photos, ["a cat on a red car", "a cat", "red car"])
    assert drawn["caption"] == "a cat on a red car"
    assert drawn["path"] == str(tmp_path / "out.png")
    monkeypatch.setattr(phrases, "check_pipeline", lambda name: None)
    monkeypatch.setattr(phrases, "noun_phrases", lambda captions, **options: [["cat"] for _ in captions])
    assert _command(*options) == 0
    assert drawn["arguments"][2] == ["a cat on a red car", "cat"]
    assert _command(*options, "--phrases", "red car, a cat on a red car, red car") == 0
    assert drawn["arguments"][2] == ["a cat on a red car", "red car"]  # each once
    (tmp_path / "more").mkdir()
    other_way = f"{tmp_path}/more/../b.png"
    assert _command(*options, "--phrases=red", "--image", other_way) == 0
    assert drawn["arguments"][1] == [other_way, *(str(tmp_path / f"{name}.png") for name in "ac")]


def test_curves_of_a_workdir(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "detection/loss": 2.0}) + "\n")
    assert _command("curves", "--metrics", tmp_path, "--output", tmp_path / "curves.png") == 0
    assert np.asarray(Image.open(tmp_path / "curves.png")).std() > 0
    chosen = ("--names= loss , ", "--output", tmp_path / "loss.png")
    assert _command("curves", "--metrics", tmp_path / "metrics.jsonl", *chosen) == 0
    assert _command("curves", "--metrics", tmp_path, "--names=nothing", "--output", tmp_path / "x.png") == 1
    assert "has no nothing; it has loss" in capsys.readouterr().err


def test_bars_are_ordered_and_one_is_marked():
    picture = charts.bars(["a", "b", "c"], np.array([1.0, 3.0, 2.0]), x="similarity", marked=2)
    place = {i: np.nonzero(_has(picture, PALETTE[i]))[0] for i in (0, 1)}
    assert place[0].min() < place[1].min() < place[1].max() < place[0].max()  # b, c, a from the top
    rows = _has(picture, PALETTE[0]).sum(axis=1)
    assert rows.argmax() < place[1].min()  # the longest is on top
    widths = [_has(picture, PALETTE[i]).any(axis=0).sum() for i in (0, 1)]
    assert widths[1] == pytest.approx(widths[0] * 2 / 3, abs=3)


def test_colors_frames_and_charts_as_arrays(tmp_path):
    assert charts.hex_color((1, 160, 255)) == "#01a0ff"
    picture = drawing.frame(np.zeros((2, 3, 3), np.uint8))
    assert picture.shape == (2 + 2 * drawing.MARGIN_PX, 3 + 2 * drawing.MARGIN_PX, 3)
    assert (picture == 0).all(-1).sum() == 6
    assert (picture[0] == 255).all()
    drawn = charts.render(charts.Figure(figsize=(2, 1), dpi=50), tmp_path / "new" / "chart.png")
    assert (drawn.shape, drawn.dtype) == ((50, 100, 3), np.uint8)
    np.testing.assert_array_equal(Image.open(tmp_path / "new" / "chart.png"), drawn)


def test_metrics_are_in_the_order_of_their_steps_and_the_last_line_of_a_step_counts(tmp_path):
    rows = [{"step": 9, "a": 1.0}, {"step": 4, "a": 2.0, "b": None}, {"step": 9, "a": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ((name, (steps, values)),) = charts.read_metrics(tmp_path / "metrics.jsonl").items()
    assert (name, steps.tolist(), values.tolist()) == ("a", [4, 9], [2.0, 3.0])


@pytest.mark.parametrize(("bottom", "top"), [(False, 0), (True, 6)])
def test_cells_of_a_row_are_aligned(bottom, top):
    low, high = np.zeros((4, 5, 3), np.uint8), np.full((10, 5, 3), 7, np.uint8)
    picture = drawing.grid([low, high], columns=2, bottom=bottom)
    assert np.nonzero((picture[:, :5] == 0).all(-1).all(-1))[0].tolist() == list(range(top, top + 4))
