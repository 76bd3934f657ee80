"""What figures and charts hold: texts, data, places and colours, taken before they become pixels."""

import json
import types

import matplotlib.colors
import numpy as np
import pytest
from micro import micro_config

from detclipv2_jax.colors import PALETTE, color_of, hex_color, nth_color
from detclipv2_jax.data import tokenizer, transforms
from detclipv2_jax.data.schema import Batch, Kind
from detclipv2_jax.geometry import anchors as anchor_lib
from detclipv2_jax.inference import Photos, detect
from detclipv2_jax.losses.proposals import Proposals
from detclipv2_jax.models.detclip import Regions
from detclipv2_jax.visualize import __main__ as command
from detclipv2_jax.visualize import alignment, charts, drawing, figures, panels, regions

PHOTO = np.full((60, 90, 3), 128, np.uint8)


@pytest.fixture
def figure(monkeypatch):
    """Holds the last matplotlib figure under `figure`; no pixels are made of it."""
    held = types.SimpleNamespace()
    monkeypatch.setattr(charts, "render", lambda figure, path: setattr(held, "figure", figure))
    return held


@pytest.fixture
def drawn(monkeypatch):
    """The texts, photos and legends that a picture was put together from."""
    held = types.SimpleNamespace(texts=[], photos=[], legends=[])
    blank = np.zeros((8, 8, 3), np.uint8)

    def text_block(text, **options):
        held.texts.append(text)
        return blank

    def photo(image, boxes, texts, colors, **options):
        held.photos.append((np.asarray(boxes).tolist(), list(texts), list(colors), options))
        return blank

    monkeypatch.setattr(drawing, "text_block", text_block)
    monkeypatch.setattr(drawing, "photo", photo)
    monkeypatch.setattr(drawing, "legend", lambda entries, **options: held.legends.append(list(entries)) or blank)
    return held


def colors_of(collection):
    return [matplotlib.colors.to_hex(color) for color in collection]


# --- charts


def test_curves_show_values_and_moving_means_and_their_groups(tmp_path, figure):
    steps = np.arange(1, 101)
    values = np.random.default_rng(0).normal(size=100)
    rows = [
        {
            "step": int(step), "detection/loss": value, "grounding/loss": 0.0 * value, "eval/top1": 0.5,
            "timing/offset": 30.0 if step == 1 else (-0.5, 0.5)[step % 2], "eval/AP": -1 if step == 1 else step / 1000,
            "eval/APc": -1,
        }
        for step, value in zip(steps, values, strict=True)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    charts.curves(tmp_path / "metrics.jsonl")
    panels = {axes.get_title(): axes for axes in figure.figure.axes if axes.get_title()}
    assert list(panels) == ["loss", "scores (%)", "AP (%)", "offset"]
    thin, thick, *others = panels["loss"].lines
    np.testing.assert_allclose(thin.get_xydata(), np.stack([steps, values], axis=1))
    mean = [np.mean(values[max(0, i - 3) : i + 3]) for i in range(100)]  # a twentieth of the values, and one
    np.testing.assert_allclose(thick.get_xydata(), np.stack([steps, mean], axis=1))
    assert thin.get_linewidth() < thick.get_linewidth()
    assert len(others) == 2
    assert colors_of(line.get_color() for line in panels["loss"].lines) == [hex_color(PALETTE[i]) for i in (0, 0, 1, 1)]
    np.testing.assert_allclose(panels["AP (%)"].lines[0].get_ydata()[[0, 99]], [-100, 10])
    assert panels["offset"].get_ylim() == (-0.5, 0.75)  # the first value hides no others
    assert [text.get_text() for text in panels["scores (%)"].get_yticklabels()] == ["top1"]
    (legend,) = figure.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["detection", "grounding", "eval", "timing"]
    assert colors_of(line.get_color() for line in legend.get_lines()) == [hex_color(nth_color(i)) for i in (0, 1, 3, 4)]


def test_a_moving_mean_is_of_51_values_at_most(tmp_path, figure):
    values = np.random.default_rng(0).normal(size=2000)
    rows = [json.dumps({"step": step, "a": value}) for step, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    charts.curves(tmp_path / "metrics.jsonl")
    _, thick = figure.figure.axes[0].lines
    assert thick.get_ydata()[1000] == pytest.approx(values[975:1026].mean())


def test_a_quantity_below_zero_is_shown_whole(tmp_path, figure):
    rows = [json.dumps({"step": step, "a": -1.0 - step % 7}) for step in range(100)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    charts.curves(tmp_path / "metrics.jsonl")
    low, high = figure.figure.axes[0].get_ylim()
    assert low < -7
    assert -1 < high < 0


def test_panels_stand_four_in_a_row(tmp_path, figure):
    rows = [{"step": step} | {f"{name}": step for name in "abcdef"} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    charts.curves(tmp_path / "metrics.jsonl", names=["f", "b", "a", "d", "e"])
    shown = [axes for axes in figure.figure.axes if axes.axison]
    assert [axes.get_title() for axes in shown] == ["f", "b", "a", "d", "e"]
    assert [axes.get_subplotspec().get_gridspec().get_geometry() for axes in shown] == [(2, 4)] * 5
    assert {line.get_color() for axes in shown for line in axes.lines} == {"#191919"}  # of no group
    charts.curves(tmp_path / "metrics.jsonl", names=["a", "b", "c", "d"])
    assert [axes.get_subplotspec().get_gridspec().get_geometry() for axes in figure.figure.axes] == [(1, 4)] * 4
    assert shown[0].lines[1].get_marker() == "o"  # two points make no line
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"step": 3, "a": 9}])))
    charts.curves(tmp_path / "metrics.jsonl", names=["a"])
    assert figure.figure.axes[0].lines[1].get_marker() != "o"


def test_only_scores_are_in_percent():
    steps = np.array([1, 2])
    series = {name: (steps, np.array([0.5, 1.0])) for name in ("eval/AP", "eval/seconds", "a/top1", "a/loss")}
    shown = {name: next(iter(lines.values()))[1].tolist() for name, lines in charts._panels(series).items()}
    assert shown == {"loss": [0.5, 1], "AP": [50, 100], "top1": [50, 100], "seconds": [0.5, 1]}


def test_a_trade_off_has_new_data_to_the_right_and_old_data_upwards(figure):
    points = [(0.0, 0.2, 0.5), (0.5, 0.35, 0.45), (1.0, 0.4, 0.2)]
    charts.trade_off(points, chosen=1, score="AP")
    (axes,) = figure.figure.axes
    line, mark = axes.lines
    np.testing.assert_allclose(line.get_xydata(), [[20, 50], [35, 45], [40, 20]])
    np.testing.assert_allclose(mark.get_xydata(), [[35, 45]])
    assert [(text.get_text(), *np.round(text.xy, 6)) for text in axes.texts] == [
        ("0", 20, 50), ("0.5", 35, 45), ("1", 40, 20)
    ]  # fmt: skip
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("AP on the new data (%)", "AP on the old data (%)")


def test_lines_are_drawn_with_their_mean(figure):
    x = np.array([0.5, 1.0])
    series = {
        "with": [(x, np.array([10.0, 20.0])), (x, np.array([12.0, 28.0])), (x, np.array([11.0, 21.0]))],
        "without": [(x, np.array([1.0, 2.0]))],
    }
    charts.lines(series, x="share", y="AP")
    (axes,) = figure.figure.axes
    found = [(line.get_xdata().tolist(), line.get_ydata().tolist(), line.get_label()) for line in axes.lines]
    assert [ys for _, ys, _ in found] == [[10, 20], [12, 28], [11, 21], [11, 23], [1, 2], [1, 2]]
    assert all(xs == [0.5, 1.0] for xs, _, _ in found)
    assert [label for *_, label in found if label[0] != "_"] == ["with (3 runs)", "without (1 runs)"]
    assert colors_of(line.get_color() for line in axes.lines) == [hex_color(PALETTE[i]) for i in (0, 0, 0, 0, 1, 1)]
    assert axes.lines[3].get_marker() != axes.lines[5].get_marker()
    assert axes.lines[3].get_linewidth() > axes.lines[0].get_linewidth()
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_ylim()[0]) == ("share", "AP", 0.0)
    charts.lines(series, x="share", y="AP", mark=(0.75, "they part"))
    (axes,) = figure.figure.axes
    assert axes.lines[0].get_xdata() == [0.75, 0.75]
    assert [text.get_text() for text in axes.texts] == ["they part"]


def test_histograms_have_a_row_a_stream(figure):
    edges = np.array([0.0, 1, 3])
    rows = {"a": {"width": (edges, [4, 2]), "height": (edges, [1, 5])}, "b": {"width": (edges, [7, 8])}}
    charts.histograms(rows)
    shown = [axes for axes in figure.figure.axes if axes.axison]
    assert [axes.get_title() for axes in shown] == ["a\nwidth", "a\nheight", "b\nwidth"]
    assert [axes.get_subplotspec().num1 for axes in shown] == [0, 1, 2]
    for axes, counts in zip(shown, ([4, 2], [1, 5], [7, 8]), strict=True):
        (stairs,) = axes.patches
        assert (stairs.get_data().values.tolist(), stairs.get_data().edges.tolist()) == (counts, [-0.5, 0.5, 2.5])
        assert axes.get_ylabel()
        assert all(place == round(place) for place in axes.get_xticks())


def test_what_is_always_the_same_is_said_and_not_drawn(figure):
    varied, one = (np.array([0, 1, 2]), [4, 2]), (np.array([3, 4]), [6])
    charts.histograms(
        {"a": {"boxes": varied, "side": one, "text": one}, "b": {"boxes": one, "side": (one[0] + 2, [5])}}
    )
    shown = [axes for axes in figure.figure.axes if axes.axison]
    assert [axes.get_title() for axes in shown] == ["a\nboxes", "b\nboxes"]
    assert [tick for tick in shown[1].get_xticks() if 2.5 <= tick <= 3.5] == [3]
    assert figure.figure.get_supxlabel() == "side: always 3 (a), 5 (b)\ntext: always 3"
    charts.histograms({"a": {"width": (np.array([3, 5]), [6])}})  # a bar of two numbers is not always the same
    assert figure.figure.get_supxlabel() == ""


# --- detections and alignment


def test_every_box_has_its_word_and_score_and_the_legend_counts_what_is_drawn(drawn):
    boxes = np.array([[20.0 * i, 10, 20 * i + 15, 40] for i in range(4)])
    labels, scores, names = np.array([2, 0, 2, 2]), np.array([0.9, 0.456, 0.3, 0.29]), ["cat", "dog", "red car"]
    figures.detections(PHOTO, boxes, labels, names, scores=scores, min_score=0.3, title="a.jpg")
    blue, orange, green = map(color_of, ("red car", "cat", "dog"))
    ((shown, texts, colors, _),) = drawn.photos
    assert shown == boxes[:3].tolist()
    assert texts == ["red car 0.90", "cat 0.46", "red car 0.30"]
    assert colors == [blue, orange, blue]
    assert drawn.legends == [[(blue, "red car × 2"), (orange, "cat")]]
    assert drawn.texts == ["found: the best 3 of 4", "a.jpg"]
    truth = boxes[[3, 0]], np.array([1, 0])
    figures.detections(PHOTO, boxes[:1], labels[:1], names, scores=scores[:1], min_score=0.9, truth=truth)
    found, annotated = drawn.photos[1:]
    assert (annotated[0], annotated[1]) == (truth[0].tolist(), ["dog", "cat"])
    assert (annotated[2], found[2]) == ([green, orange], [blue])
    assert drawn.texts[2:] == ["found: 1", "annotated: 2"]
    figures.detections(PHOTO, boxes, labels, names, scores=scores, max_drawn=2)
    figures.detections(PHOTO, boxes, labels, names, max_drawn=3)
    assert [photo[0] for photo in drawn.photos[3:]] == [boxes[:2].tolist(), boxes[:3].tolist()]
    assert drawn.texts[4:] == ["found: the best 2 of 4"]  # of annotated boxes nothing is said
    # annotated boxes stand alone in the legend without a count
    assert drawn.legends[1] == [(blue, "red car"), (green, "dog"), (orange, "cat")]


def test_a_place_that_is_covered_just_as_much_as_allowed_is_drawn(drawn):
    boxes = np.array([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 5]])
    options = {"scores": np.array([0.9, 0.8, 0.7])}
    for max_iou, kept in ((1.0, [0, 1, 2]), (0.5, [0, 2]), (0.49, [0])):
        figures.detections(PHOTO, boxes, np.arange(3), ["a", "b", "c"], max_iou=max_iou, **options)
        assert drawn.photos[-1][0] == boxes[kept].tolist()


def test_every_phrase_has_its_box_its_map_and_its_numbers(drawn, monkeypatch):
    heated = []
    monkeypatch.setattr(
        drawing, "heat", lambda image, values, **scale: heated.append((values.tolist(), scale)) or image
    )
    bars = []
    monkeypatch.setattr(drawing, "color_bar", lambda **bar: bars.append(bar) or np.zeros((8, 8, 3), np.uint8))
    boxes, maps = np.array([[1.0, 2, 3, 4], [5, 6, 7, 8]]), np.array([[[-1.0, 2.0]], [[0.0, 5.0]]])
    grids = []
    monkeypatch.setattr(drawing, "grid", lambda cells, **form: grids.append((len(cells), form)) or cells[0])
    figures.alignment(
        PHOTO, ["a car", "sky"], boxes, scores=np.array([2.0, 5.0]), ranks=np.array([3, 1]), num_images=4, maps=maps,
        caption="a car", title="a.jpg",
    )  # fmt: skip
    *cells, title, caption, footer = drawn.texts
    assert title == "a.jpg"
    assert cells == [
        "best region of every phrase",
        "1 a car\nscore 2.00, rank 3 of 4",
        "2 sky\nscore 5.00, rank 1 of 4",
    ]
    assert caption == "“a car”"
    assert "among 4, 1 is best" in footer
    blue, orange = map(color_of, ("a car", "sky"))
    size = {"long_side": 440}
    assert drawn.photos == [
        (boxes.tolist(), ["1 a car", "2 sky"], [blue, orange], size),
        ([boxes[0].tolist()], [""], [blue], size),
        ([boxes[1].tolist()], [""], [orange], size),
    ]
    scale = {"low": -1.0, "high": 5.0}  # one for both
    assert heated == [(values, scale) for values in maps.tolist()]
    assert [{key: bar[key] for key in scale} for bar in bars] == [scale]
    upright = np.zeros((90, 60, 3), np.uint8)
    figures.alignment(upright, ["a"], boxes[:1], scores=np.ones(1), ranks=np.ones(1, int), num_images=1, maps=maps[:1])
    assert drawn.photos[-1][3] == {"long_side": 480}  # 320 px wide
    assert grids == [(3, {"columns": 3, "bottom": True}), (2, {"columns": 4, "bottom": True})]
    assert len(drawn.texts) == 6 + 3  # neither caption nor title


# --- figures of a batch


def batch(**changes):
    """Returns two images of 64 x 96 px; the second, lower, has one box."""
    texts = ["a red cat", "dog", "tree", "a photo"]
    fields = {
        "image": np.zeros((2, 64, 96, 3), np.uint8), "extent": np.array([[64, 96], [40, 96]]),
        "scale": np.array([[0.5, 0.25], [2.0, 1.0]], np.float32), "original_size": np.array([[128, 384], [20, 96]]),
        "image_mask": np.ones(2, bool), "example_id": np.array([5, 6]),
        "boxes": np.array([[[8, 8, 40, 40], [50, 10, 90, 60]], [[0, 0, 60, 40], [0, 0, 0, 0]]], np.float32),
        "box_mask": np.array([[True, True], [True, False]]), "box_concepts": np.array([[1, 0], [2, 0]]),
        "concept_tokens": tokenizer.tokenize(texts), "concept_mask": np.ones(4, bool), "concept_ids": None,
        "caption_concepts": np.array([[3, 2, 0], [0, 1, 2]]),
        "caption_mask": np.array([[True, False, True], [True, True, True]]),
    }  # fmt: skip
    return Batch(**fields | changes)


def test_a_contact_sheet_names_as_many_negatives_as_there_is_room_for(drawn, monkeypatch):
    grids = []
    monkeypatch.setattr(drawing, "grid", lambda cells, **form: grids.append((len(cells), form)) or cells[0])
    for num, end in ((63, ""), (64, " | …")):
        tokens = tokenizer.tokenize([f"thing {i}" for i in range(num)])
        texts = tokenizer.decode(tokens)
        table = {"concept_tokens": tokens, "concept_mask": np.ones(num, bool)}
        figures.training_batch(batch(**table, caption_mask=np.zeros((2, 3), bool)), kind=Kind.DETECTION, max_images=1)
        named = " | ".join(texts[3:63])  # the first three are of images
        counts = f"{num} concepts in the table: 3 of images, {num - 3} negatives"
        assert drawn.texts[-1] == f"{counts}\nnegatives: {named}{end}"
    assert grids == [(1, {"columns": 3})] * 2
    upright = {"image": np.zeros((2, 96, 64, 3), np.uint8), "extent": np.array([[96, 64], [96, 64]])}
    figures.training_batch(batch(**upright), kind=Kind.DETECTION)
    assert grids[-1] == (2, {"columns": 4})
    assert [photo[3] for photo in drawn.photos] == [{"long_side": 460}] * 2 + [{"long_side": 480}] * 2


def test_targets_are_the_centres_of_the_anchors_of_each_box(figure):
    given = batch()
    panels.targets(given)
    grid = anchor_lib.grid((64, 96))
    centers = {tuple(center) for center in (grid.boxes[:, :2] + grid.boxes[:, 2:]) / 2}
    names = [["dog", "a red cat"], ["tree"]]
    np.testing.assert_allclose(figure.figure.get_size_inches(), [2 * 4.2, 4.2 * 64 / 96 + 1.1])  # as high as the canvas
    for i, axes in enumerate(figure.figure.axes[:2]):
        (image,) = axes.images
        assert list(image.get_extent()) == [0, 96, 64, 0]
        assert axes.get_ylim() == (64, 0)
        np.testing.assert_array_equal(image.get_array(), drawing.hatch_padding(given.image[i], given.extent[i]))
        counts = []
        for n, (dots, text) in enumerate(zip(axes.collections, axes.texts, strict=True)):
            x1, y1, x2, y2 = given.boxes[i, n]
            places = dots.get_offsets()
            assert {tuple(place) for place in places} <= centers
            assert ((places > [x1, y1]) & (places < [x2, y2])).all()
            counts.append(len(places))
            assert text.get_text() == f"{names[i][n]}: {len(places)}"
            assert text.get_position() == (x1, y1)
            assert set(dots.get_sizes()) <= {3 * stride for stride in anchor_lib.STRIDES}
            assert colors_of(dots.get_facecolor()) == [hex_color(PALETTE[n])]
        assert min(counts) > 1
        assert axes.get_title() == f"{len(names[i])} boxes, {sum(counts)} of {len(grid.boxes)} anchors"
        corners = [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axes.patches[::2]]
        sides = given.boxes[i, : len(counts)]
        assert corners == [(*box[:2], *(box[2:] - box[:2])) for box in sides]
    panels.targets(given, max_images=1, top_k=1)
    (axes,) = figure.figure.axes
    assert sum(len(dots.get_offsets()) for dots in axes.collections) < 10  # one a level and box at most


def test_samples_are_where_they_were_taken_and_as_large_as_their_weight(figure):
    regular, shift = np.arange(18.0).reshape(1, 9, 2), np.array([2, -1])
    weights = np.linspace(0, 1, 9)[None]
    panels.sampling(
        PHOTO, ["a cat"], np.array([[3.0, 4, 13, 24]]), regular=regular, points=regular + shift, weights=weights,
        strides=np.array([16.0]),
    )  # fmt: skip
    (axes,) = figure.figure.axes
    assert axes.get_title() == "a cat\nlevel of stride 16 px"
    assert list(axes.images[0].get_extent()) == [0, 90, 60, 0]
    squares, dots = axes.collections
    np.testing.assert_array_equal(squares.get_offsets(), regular[0])
    np.testing.assert_array_equal(dots.get_offsets(), regular[0] + shift)
    np.testing.assert_allclose(dots.get_sizes(), 20 + 120 * weights[0])
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [place.tolist(), (place + shift).tolist()] for place in regular[0]
    ]
    patch = axes.patches[0]
    assert (*patch.get_xy(), patch.get_width(), patch.get_height()) == (3, 4, 10, 20)
    five = {"regular": regular, "points": regular, "weights": weights, "strides": np.array([8.0])}
    five = {name: np.repeat(array, 5, axis=0) for name, array in five.items()}
    panels.sampling(PHOTO, list("abcde"), np.ones((5, 4)), **five)
    shown = [axes for axes in figure.figure.axes if axes.get_title()]
    assert [axes.get_subplotspec().get_gridspec().get_geometry() for axes in shown] == [(2, 4)] * 5
    assert not any(axes.axison for axes in figure.figure.axes)


def test_phrases_of_a_batch_are_drawn_on_their_photos(monkeypatch, tmp_path):
    """Every image has its own scale, what is no phrase stands between phrases, and three pictures of two are two."""
    given, asked, calls = batch(), [], []
    found = detect.Alignment(
        boxes=np.arange(24.0).reshape(2, 3, 4), scores=np.arange(6.0).reshape(2, 3),
        ranks=np.array([[1, 2, 3], [4, 5, 6]]), maps=np.zeros((2, 3, 8, 12)),
    )  # fmt: skip
    photos = Photos(np.zeros((7, 64, 96, 3)), given.extent, given.scale, given.original_size)
    detector = types.SimpleNamespace(
        encode_tokens=lambda params, tokens: asked.extend(tokenizer.decode(tokens)) or np.zeros((len(tokens), 4)),
        to_global=lambda batch: photos,
        align=lambda params, photos, phrases, index: (
            (phrases.shape == (2, 3, 4) and index.tolist() == [0, 1]) and found
        ),
    )
    monkeypatch.setattr(figures, "alignment", lambda *arguments, **options: calls.append((*arguments, options)))
    alignment.draw_batch(detector, None, given, num_pictures=3, folder=tmp_path, name="x")
    assert asked == ["a photo", "tree", "a red cat", "a red cat", "dog", "tree"]
    for i, (image, phrases, boxes, options) in enumerate(calls):
        used = [[0, 2], [0, 1, 2]][i]
        np.testing.assert_array_equal(image, given.image[i, : given.extent[i, 0]])
        assert phrases == [["the whole caption", "a red cat"], ["the whole caption", "dog", "tree"]][i]
        assert options["caption"] == ["a photo", "a red cat"][i]
        assert options["title"] == f"example {given.example_id[i]}"
        np.testing.assert_array_equal(boxes, found.boxes[i][used] * [[0.25, 0.5, 0.25, 0.5], [1.0, 2.0, 1.0, 2.0]][i])
        assert options["scores"].tolist() == found.scores[i][used].tolist()
        assert options["ranks"].tolist() == found.ranks[i][used].tolist()
        assert options["num_images"] == 7
        assert options["maps"].shape == (len(used), [8, 5][i], 12)
        assert options["path"] == tmp_path / f"x_{i}.jpg"
    assert len(calls) == 2


# --- what the command and the regions hand over


def test_the_command_hands_over_boxes_in_pixels_of_what_was_read(monkeypatch, tmp_path, capsys):
    rows = [
        {"image_id": 4, "category_id": 2, "bbox": [8, 20, 40, 60], "score": 0.3},
        {"image_id": 4, "category_id": 9, "bbox": [0, 0, 8, 8], "score": 0.9},
    ]
    files = ["sub/a.png", "b.png", "c.png"]
    truth = {
        "images": [
            {"id": i, "file_name": name, "height": 120, "width": 360} for i, name in zip((4, 5, 6), files, strict=True)
        ],
        "categories": [{"id": 9, "name": "wild_dog"}, {"id": 2, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 4, "category_id": 2, "bbox": [4, 2, 8, 8]}],
    }
    for name, content in (("found", rows), ("truth", truth)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    paths, calls = [], []
    monkeypatch.setattr(transforms, "read", lambda path: paths.append(path) or transforms.Photo(PHOTO, (120, 360)))
    monkeypatch.setattr(figures, "detections", lambda *arguments, **options: calls.append((*arguments, options)))
    given = {"detections": str(tmp_path / "found.json"), "images": "photos", "output": "out"}
    command.detections(**given, annotations=str(tmp_path / "truth.json"), min_score=0.25, max_drawn=7, max_images=2)
    assert paths == ["photos/sub/a.png", "photos/b.png"]
    _, boxes, labels, names, options = calls[0]
    np.testing.assert_allclose(boxes, [[0, 0, 2, 4], [2, 10, 12, 40]])  # best first; a quarter and a half as large
    assert (labels.tolist(), names, options["scores"].tolist()) == ([0, 1], ["wild dog", "cat"], [0.9, 0.3])
    np.testing.assert_allclose(options["truth"][0], [[1, 1, 3, 5]])
    assert options["truth"][1].tolist() == [1]
    assert (options["min_score"], options["max_drawn"], options["title"]) == (0.25, 7, "sub/a.png")
    assert calls[1][1].shape == (0, 4)
    assert [str(options["path"]) for *_, options in calls] == capsys.readouterr().out.split()
    truth["images"][0]["file_name"] = "../a.png"
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    with pytest.raises(ValueError, match=r"\.\./a\.png"):
        command.detections(**given, annotations=str(tmp_path / "truth.json"))
    named = [row | {"file_name": "a.png", "name": "cat"} for row in rows]
    (tmp_path / "found.json").write_text(json.dumps([named[0] | {"image_id": 1}, *named]))
    calls.clear()
    command.detections(**given)
    assert [call[-1]["truth"] for call in calls] == [None, None]
    assert (calls[0][-1]["min_score"], calls[0][-1]["max_drawn"]) == (0.2, 20)
    for row in named:
        row["file_name"] = "/etc/a.png"
    (tmp_path / "found.json").write_text(json.dumps(named))
    with pytest.raises(ValueError, match=r"the file name '/etc/a\.png' leads out of --images=photos"):
        command.detections(**given)
    (tmp_path / "found.json").write_text(json.dumps(rows))
    (tmp_path / "truth.json").write_text(json.dumps(truth | {"images": truth["images"][1:]}))
    with pytest.raises(ValueError, match="does not list the image 4 of"):
        command.detections(**given, annotations=str(tmp_path / "truth.json"))


def test_proposals_are_drawn_in_pixels_of_the_photo_with_their_nearest_text(monkeypatch):
    """Three places, of which two are used; scaled by 1/2 in y and 1/4 in x; one reaches beyond the photo."""
    num = len(anchor_lib.grid((64, 96)).boxes)
    embeddings = np.zeros((2, num, 2), np.float32)
    embeddings[1, [7, 3]] = [[0.5, -0.25], [-0.5, -1.0]]
    on_photo = np.arange(2 * num).reshape(2, num) % 3 > 0
    found = regions.Anchors(
        Regions(embeddings, None, None, None),
        np.zeros((2, num, 4)),
        None,
        None,
        on_photo,
        np.float32(8.0),
        np.float32(-4.0),
    )
    chosen = Proposals(
        np.array([[0, 0, 0], [7, 3, 0]]), np.array([[False] * 3, [True, True, False]]),
        np.array([[[0.0] * 4] * 3, [[2, 4, 12, 20], [90, 3, 99, 70], [0] * 4]]),
    )  # fmt: skip
    photos = Photos(
        np.zeros((2, 64, 96, 3), np.uint8), None, np.array([[1, 1], [0.5, 0.25]]), np.array([[9, 9], [112, 384]])
    )
    predictor = types.SimpleNamespace(
        config=micro_config(), detector=None, params=None, photos=lambda images, index: photos,
        vocabulary=lambda texts: (tuple(texts), np.concatenate([np.eye(2), np.zeros((2, 2))]), np.arange(4) < 2),
    )  # fmt: skip
    asked, calls = {}, []
    monkeypatch.setattr(regions, "look", lambda *arguments: found)
    monkeypatch.setattr(regions.proposals, "select_proposals", lambda *_, **options: asked.update(options) or chosen)
    monkeypatch.setattr(figures, "detections", lambda *arguments, **options: calls.append((*arguments, options)))
    regions.draw_proposals(predictor, [PHOTO, PHOTO], [["cat"], ["dog", "cat"]], index=1, max_drawn=9)
    ((_, boxes, labels, names, options),) = calls
    assert boxes.tolist() == [[8, 8, 48, 40], [360, 6, 384, 112]]
    assert (labels.tolist(), names, options["scores"].tolist()) == ([0, 0], ("cat", "dog"), [4.0, -4.0])
    assert (options["min_score"], options["max_iou"], options["max_drawn"]) == (-np.inf, 1.0, 9)
    assert options["title"] == "2 regions that 2 texts of 2 images choose, each with its best text"
    np.testing.assert_array_equal(asked["anchor_mask"], on_photo)
    captions = asked["captions"]
    assert (captions.concepts.tolist(), captions.mask.tolist()) == ([[0, 0], [1, 0]], [[True, False], [True, True]])
    assert asked["batch_captions"] is captions
    assert asked["table"].mask.tolist() == [True, True, False, False]
    assert asked["table"].canonical.tolist() == [0, 1, 2, 3]


def test_the_photo_of_an_alignment_is_read_upright_or_taken_as_it_is(monkeypatch):
    predictor = types.SimpleNamespace(
        align=lambda images, phrases, index: detect.Alignment(np.ones((1, 4)), [0.5], [2], np.zeros((1, 1, 1)))
    )
    calls = []
    monkeypatch.setattr(transforms, "read", lambda path: transforms.Photo(PHOTO, (60, 90)))
    monkeypatch.setattr(figures, "alignment", lambda *arguments, **options: calls.append((*arguments, options)))
    for images, index in ((["x/a.png", PHOTO + 1], 0), (["x/a.png", PHOTO + 1], 1)):
        alignment.draw(predictor, images, ["cat"], index=index, caption="a", path="x.png")
        image, phrases, _, options = calls.pop()
        assert image[0, 0, 0] == 128 + index
        assert options["title"] == ["a.png", ""][index]
        assert (phrases, options["num_images"], options["caption"], options["path"]) == (["cat"], 2, "a", "x.png")
