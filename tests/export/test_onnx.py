"""Operations as ONNX nodes against JAX, where the whole detector does not show their every side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.export import symbolic_shape

from detclipv2_jax.geometry import nms
from detclipv2_jax.inference import detect

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from detclipv2_jax.export import onnx_graph, onnx_model, onnx_rules  # noqa: E402  (need onnx)


def build(function, arrays, *, free=False, opset=18, **options):
    """Returns the model of a function of arrays that returns one; with `free` their first sizes are."""
    first = symbolic_shape("b")[0]
    shapes = [jax.ShapeDtypeStruct((first, *x.shape[1:]) if free else x.shape, x.dtype) for x in arrays]
    names = tuple(f"x{i}" for i in range(len(arrays)))
    called = {"weights": {}} | options
    kept = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in called["weights"].items()}
    return onnx_model.build("f", function, (kept, *shapes), names=names, opset=opset, **called)


def run(model, arrays):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {f"x{i}": x for i, x in enumerate(arrays)})[0]


def check(function, *arrays, free=False, **options):
    """Checks that both find the same, for another batch than the traced one too."""
    found = run(build(lambda _, *x: function(*x), arrays, free=free, **options), arrays)
    np.testing.assert_allclose(found, function(*arrays), rtol=1e-6, atol=1e-6)
    assert found.dtype == np.asarray(function(*arrays)).dtype


RNG = np.random.default_rng(0)


def test_nms_of_a_batch_whose_images_end_at_different_times():
    corners = RNG.integers(0, 40, (3, 300, 2))
    boxes = np.concatenate([corners, corners + RNG.integers(1, 40, (3, 300, 2))], axis=2).astype(np.float32)
    scores = RNG.integers(0, 9, (3, 300)).astype(np.float32)  # many are equal
    mask = RNG.random((3, 300)) < np.array([[0.9], [0.3], [0.0]])
    classes = RNG.integers(0, 3, (3, 300)).astype(np.int32)

    def keep(*arrays):
        one = lambda b, s, m, c: nms.nms(b, s, mask=m, classes=c, iou_threshold=0.4, max_outputs=70)  # noqa: E731
        kept, used = jax.vmap(one)(*arrays)
        return jnp.where(used, kept, -1)

    check(keep, boxes, scores, mask, classes, free=True)
    assert (np.asarray(keep(boxes, scores, mask, classes)) >= 0).sum(1).tolist() != [70, 70, 70]


def test_best_pairs_of_several_chunks_of_words_in_the_order_of_equals():
    regions = RNG.integers(-1, 2, (2, 40, 4)).astype(np.float32)
    text = RNG.integers(-1, 2, (24, 4)).astype(np.float32)

    def best(regions, text):
        options = {"scale": jnp.float32(1.0), "bias": jnp.float32(0.0), "num": 30, "word_chunk": 8}
        mask, ones = jnp.any(text != 0, axis=1), jnp.ones(regions.shape[:2], jnp.float32)
        _, anchors, words = detect._best_pairs(regions, text, mask, ones, **options)
        return anchors * 100 + words

    check(best, regions, text)


X = RNG.normal(size=(3, 6, 8)).astype(np.float32)
PLACES = np.array([[0, 9, 2], [5, 1, 1], [3, -2, 4]], np.int32)


def at_starts(x, starts):
    return jax.vmap(lambda y, start: jax.lax.dynamic_slice(y, (start,), (3,)))(x, starts)


def changed(x, places):
    return jax.vmap(lambda y, i: y.at[jnp.abs(i)].set(7.0, mode="drop"))(x, places)


def numbers(x):
    return jnp.sign(x) * jnp.sqrt(jnp.abs(x)) + jax.lax.rsqrt(x * x + 1) - jnp.floor(-x) + jnp.square(x) + x**2


def plain(x):
    """Returns the results of all operations that are one node, of pairs of numbers that may be equal."""
    y, positive, lax = x[:, ::-1], jnp.abs(x) + 1, jax.lax
    one = [f(x) for f in (lax.abs, lax.exp, lax.floor, lax.neg, lax.sign, lax.erf, lax.logistic)]
    two = [
        f(x, y) for f in (lax.add, lax.sub, lax.mul, lax.max, lax.min, lax.eq, lax.ne, lax.ge, lax.gt, lax.le, lax.lt)
    ]
    truths = [f(x > 0, y > 0) for f in (lax.bitwise_and, lax.bitwise_or)] + [lax.bitwise_not(x > 0)]
    every = [*one, lax.sqrt(positive), lax.div(y, positive), *two, *truths]
    return jnp.stack([result.astype(jnp.float32) for result in every], axis=1)


CASES = {
    "windows, cut at the ends": (lambda x, i: at_starts(x[:, :, 1], i[:, 1]), X, PLACES),
    "elements of rows": (lambda x, i: jnp.take_along_axis(x, i[:, :, None] % 6, axis=1), X, PLACES),
    "rows for every place": (lambda x, i: x[0][i % 6], X, PLACES),
    "columns for every place": (lambda x, i: x[:, :, i[0] % 6], X, PLACES),
    "known places": (lambda x: x[:, 1, 2:5] + x[:, 5:2:-1, 7] + x[:, 0, ::-1][:, :3] + x[:, ::2, 1:6:4].sum(2), X),
    "changed places, some outside": (lambda x, i: changed(x[:, 0], i), X, PLACES),
    "truth values": (lambda x: jnp.where(x > 0, x > 1, x < -1) != (x < 0.5), X),
    "remainders": (lambda i: jax.lax.rem(i, jnp.int32(3)), PLACES),
    "sums and orders": (lambda x: jnp.cumsum(jnp.sort(x, axis=1), axis=2) + jnp.argmax(x, axis=2, keepdims=True), X),
    "every second": (lambda x: jax.lax.slice_in_dim(x, 1, 6, stride=2, axis=1), X),
    "sums from the end": (lambda x: jax.lax.cumsum(x, axis=1, reverse=True), X),
    "any and all": (lambda x: jnp.where(jnp.any(x > 1, axis=1), 2, 1) * jnp.all(x < 1, axis=1), X),
    "products": (lambda x: jnp.einsum("bij,bkj->bik", x, x[:, :2]) + jnp.einsum("bij,kj->bik", x, X[0, :2]), X),
    "repeated constants": (lambda x: jnp.concatenate([x, jnp.broadcast_to(jnp.arange(8.0), x.shape)], axis=1), X),
    "stacks": (lambda x: jnp.stack([x, jnp.broadcast_to(x[:, :1], x.shape)], axis=2).sum(axis=-1), X),
    "numbers": (numbers, X),
    "plain operations": (plain, np.round(X)),  # of which some are equal
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_operations(case):
    function, *arrays = CASES[case]
    check(function, *arrays, free=case not in ("rows for every place", "columns for every place"))


def test_free_sizes_are_computed_from_the_inputs():
    def padded(x):
        size = x.shape[0]
        more = -(-size // 4) * 4 - size
        return jnp.pad(x, (0, more)).reshape(-1, 2, 2) + jnp.arange((size + more) // 4)[:, None, None] % (size % 3 + 1)

    model = build(lambda _, x: padded(x), [np.zeros(3, np.float32)], free=True)
    for size in (1, 4, 5, 11):
        x = np.arange(size, dtype=np.float32)
        np.testing.assert_array_equal(run(model, [x]), padded(x))


def test_a_convolution_has_strides_padding_dilation_and_groups():
    kernel = RNG.normal(size=(3, 3, 4, 10)).astype(np.float32)

    def convolve(x):
        settings = {"window_strides": (2, 1), "padding": ((1, 0), (2, 1)), "rhs_dilation": (1, 2)}
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, **settings, feature_group_count=2, dimension_numbers=layout)

    check(convolve, RNG.normal(size=(2, 9, 7, 8)).astype(np.float32), free=True)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (jnp.sin, "has no form of the operation sin; export with stablehlo"),
        (lambda x: x**3, "has no power 3"),
        (
            lambda x: jax.vmap(lambda y, i: jax.lax.dynamic_slice(y, (i, i), (2, 2)))(x, jnp.arange(3)),
            "no form of this",
        ),
        (lambda x: jnp.maximum(x > 0, x > 1), "has no max of bool"),
        (lambda x: jax.lax.scan(lambda c, y: (c + y, c), x[0], x, reverse=True)[1], "no loop from the end"),
        (
            lambda x: jax.lax.conv_transpose(x, np.ones((3, 8, 2), np.float32), (2,), "SAME"),
            "no transposed convolutions",
        ),
        (lambda x: jax.lax.pad(x, 0.0, [(0, 0, 1)] * x.ndim), "no padding between elements"),
    ],
)
def test_what_has_no_form_is_named(function, message):
    with pytest.raises(ValueError, match=f"--format=onnx.*{message}"):
        build(lambda _, x: function(x), [X])


def test_int8_weights_have_a_scale_for_every_channel(tmp_path):
    sizes = (10.0 ** np.arange(-3, 5)).astype(np.float32)  # of channels
    weights = {"dense": (RNG.normal(size=(512, 8)) * sizes).astype(np.float32)}
    weights["small"] = RNG.normal(size=(8, 8)).astype(np.float32)
    x = RNG.normal(size=(3, 512)).astype(np.float32)

    def function(weights, x):
        return x @ weights["dense"] / sizes[None] @ weights["small"]

    models = {as_int8: build(function, [x], weights=weights, as_int8=as_int8) for as_int8 in (False, True)}
    for as_int8, model in models.items():
        onnx_model.save(tmp_path / f"{as_int8}.onnx", model)
        error = np.abs(run(model, [x]) - function(weights, x)) / np.abs(function(weights, x)).max()
        assert (1e-4 if as_int8 else 0) <= error.max() < (0.02 if as_int8 else 1e-6)
    assert (tmp_path / "True.onnx").stat().st_size < 0.4 * (tmp_path / "False.onnx").stat().st_size
    stored = {entry.name: entry for entry in models[True].graph.initializer}
    assert sorted(entry.data_type for entry in stored.values() if len(entry.dims) == 2) == [
        1,
        1,
        3,
    ]  # sizes, small, dense


def test_rows_of_a_table_in_int8_have_a_scale_each():
    sizes = (10.0 ** np.linspace(-3, 4, 64))[:, None]
    weights = {"table": (RNG.normal(size=(64, 16)) * sizes).astype(np.float32)}  # just as large as it must be
    places = np.array([63, 0, 17], np.int32)

    def function(weights, places):
        return weights["table"][places]

    model = build(function, [places], weights=weights, as_int8=True)
    assert 3 in {entry.data_type for entry in model.graph.initializer}
    error = np.abs(run(model, [places]) - function(weights, places)) / sizes[places]
    assert 1e-4 < error.max() < 0.02


def test_a_model_carries_what_is_said_of_it():
    model = build(lambda _, x: x, [X], about={"words": ["Käfer"], "short_side": 64})
    assert {entry.key: entry.value for entry in model.metadata_props} == {"words": '["Käfer"]', "short_side": "64"}
    assert model.producer_name == "detclipv2_jax"


@pytest.mark.parametrize("opset", [18, onnx.defs.onnx_opset_version()])
def test_every_version_of_the_operators_is_written(opset):
    onnx_model.check_opset(opset)
    model = build(lambda _, x: jnp.sum(x, axis=0), [X], opset=opset)
    assert model.opset_import[0].version == opset
    with pytest.raises(ValueError, match=f"--opset is {opset + 99}; "):
        onnx_model.check_opset(opset + 99)


def test_constants_are_stored_once():
    graph = onnx_graph.Graph()
    first, second = (onnx_graph.constant(np.ones(3, np.float32)) for _ in range(2))
    assert graph.reference(first) == graph.reference(second)
    others = [np.ones(3, np.float32).view(np.int32), np.ones((3, 1), np.float32), np.float32([1, 1, 2])]
    names = {graph.reference(onnx_graph.constant(array)) for array in others}
    assert len(names | {graph.reference(first)}) == 4
    assert onnx_graph.element_type(np.float32) == onnx.TensorProto.FLOAT
    assert graph.size(7).constant.tolist() == [7]
    (cast,) = graph.nodes_of("Cast", [onnx_graph.Value((3,), np.dtype(np.int32), "x")], [((3,), bool)], to=9)
    assert graph.whole(graph.transpose(graph.reshape(graph.cast(cast, bool), (3,)), (0,)), (3,)) is cast


def test_a_trace_becomes_nodes_that_see_the_sizes_of_inputs():
    first = symbolic_shape("b")[0]
    value = onnx_graph.Value((first, 3), np.dtype(np.float32), "x")
    graph = onnx_graph.Graph()
    graph.take_sizes(value)
    assert [node.op_type for node in graph.nodes] == ["Shape"]
    traced = jax.jit(lambda x: x.sum(axis=1)).trace(jax.ShapeDtypeStruct((first, 3), np.float32)).jaxpr
    (result,) = graph.translate(traced.jaxpr, traced.consts, [value], onnx_rules.RULES)
    assert [node.op_type for node in graph.nodes] == ["Shape", "ReduceSum"]
    assert result.shape == (first,)
    assert graph.size(first).name == graph.nodes[0].output[0]
