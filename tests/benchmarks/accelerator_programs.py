"""What `accelerator` compiles and times: whole steps at one device's share of eight, prediction, and their parts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from detclipv2_jax import inference, train_step
from detclipv2_jax.data.schema import Batch, Kind
from detclipv2_jax.geometry import anchors as anchor_lib
from detclipv2_jax.geometry import boxes as box_lib
from detclipv2_jax.geometry.nms import nms
from detclipv2_jax.losses import contrastive, proposals, selection_pallas
from detclipv2_jax.losses.alignment import AnchorTargets, FocalSettings, alignment_loss
from detclipv2_jax.losses.concept_table import Captions, Concepts, Table
from detclipv2_jax.models import deform_conv, detclip, flops, swin
from detclipv2_jax.models.detclip import Regions
from detclipv2_jax.runs import state as state_lib
from detclipv2_jax.runs.optimizer import make_optimizer
from tests.benchmarks import accelerator_inputs as inputs
from tests.benchmarks.accelerator_inputs import Normal

NUM_STEPS = 100_000  # a number in the formula of the learning rate
WORDS = 1203  # of LVIS
NAMES = 365  # of Objects365
SHARE = 8  # devices of the whole batch
PHOTOS = (1, 8)  # of a prediction
STRIDES = (8, 16, 32)
WITHOUT_KERNELS = ", without kernels"
STEPS = (Kind.DETECTION, Kind.IMAGE_TEXT, Kind.GROUNDING)  # steps, what matters most first


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled: a function, and its arguments made from a training state (or the shapes of one)."""

    name: str
    function: Callable[..., Any]
    arguments: Callable[[Any], tuple[Any, ...]]
    num_images: int = 1
    flops: Callable[[], float] | None = None  # multiplications and additions; None: counted in the traced program
    counted: Callable[..., Any] | None = None  # of the same arguments; its FLOPs count instead of the function's
    donates: bool = False  # the first argument is a state and the first result the next one
    reference: str = ""  # name of the program that computes the same in another way


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all programs share."""

    config: ConfigDict  # batch sizes are those of one device
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def model(self) -> detclip.DetCLIP:
        return detclip.from_config(self.config.model)

    @functools.cached_property
    def optimizer(self) -> Any:
        shapes = state_lib.param_shapes(self.model, context_length=self.config.model.text.context_length)
        return make_optimizer(self.config.optimizer, shapes, NUM_STEPS)

    def create(self) -> state_lib.TrainState:
        """Returns a fresh state; made to be jitted."""
        length = self.config.model.text.context_length
        params = state_lib.init_params(self.model, jax.random.key(self.config.seed), context_length=length)
        return state_lib.create(params, self.optimizer, ema=False)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.config.model.dtype)

    def chunk(self, kind: Kind) -> int:
        """Returns the images that go through the image tower at once."""
        return self.config[kind.value].batch_size // self.config.optimizer.accumulate[kind.value]

    def canvas(self, kind: Kind) -> tuple[int, int]:
        return tuple(self.config[kind.value].canvases[0])


LOGIT = (np.float32(1.0), np.float32(-4.6))  # scale and bias


def without_kernels(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, traced without the kernel for the selection of proposals, which has no key."""

    def traced(*arguments: Any) -> Any:
        with mock.patch.object(selection_pallas, "DEPTH", 1 << 30):  # the kernel takes embeddings of a multiple of it
            return function(*arguments)

    return traced


def groups(setting: Setting) -> list[Callable[[], Iterator[Program]]]:
    """Returns the makers of programs, what matters most first; the programs of a group are compiled together."""
    return [
        functools.partial(steps, setting),
        functools.partial(predictions, setting),
        functools.partial(blocks, setting),
        functools.partial(steps_without_kernels, setting, STEPS),
        functools.partial(towers, setting),
        functools.partial(losses, setting),
    ]


def steps(setting: Setting) -> Iterator[Program]:
    """Yields the training step of every kind as it is on this device."""
    for kind in STEPS:
        yield _step(setting, kind, "")


def steps_without_kernels(setting: Setting, kinds: Sequence[Kind]) -> Iterator[Program]:
    """Yields training steps without the kernels for NVIDIA GPUs."""
    config = setting.config.copy_and_resolve_references()
    config.model.swin.attention_impl = config.model.head.deform_impl = "xla"
    for kind in kinds:
        yield _step(dataclasses.replace(setting, config=config), kind, WITHOUT_KERNELS)


def _step(setting: Setting, kind: Kind, form: str) -> Program:
    config, canvas = setting.config, setting.canvas(kind)
    make_batch = functools.cache(
        functools.partial(inputs.batch, config, kind, canvas, num_names=NAMES * (kind is Kind.DETECTION))
    )
    step = train_step.make_step(
        kind, model=setting.model, tx=setting.optimizer, config=config, canvas=canvas, mesh=setting.mesh
    )
    if form == WITHOUT_KERNELS:
        step = without_kernels(step)

    def count() -> float:
        batch = make_batch()
        return flops.formula(
            config, kind, canvas, table_rows=len(batch.concept_mask), num_devices=1,
            num_concepts=inputs.num_distinct(batch),
        )  # fmt: skip

    num_images = config[kind.value].batch_size
    return Program(
        f"step {kind} {num_images} x {_text(canvas)}{form}", step, lambda state: (state, make_batch()),
        num_images=num_images, flops=count, donates=True,
    )  # fmt: skip


def _text(canvas: tuple[int, int]) -> str:
    return f"{canvas[0]}x{canvas[1]}"


def predictions(setting: Setting) -> Iterator[Program]:
    """Yields photos and the words of LVIS to boxes."""
    config, canvas = setting.config, tuple(setting.config.eval.canvases[0])
    detector = inference.Detector(setting.model)
    limits = inference.Limits.from_config(config.eval)
    num_words = -(-WORDS // inference.WORD_CHUNK) * inference.WORD_CHUNK
    embed_dim = config.model.embed_dim
    for num_images in PHOTOS:

        def arguments(state: Any, num_images: int = num_images) -> tuple[Any, ...]:
            rng = np.random.default_rng(0)
            extent = np.full((num_images, 2), canvas, np.int32)
            photos = inference.Photos(
                rng.integers(0, 256, (num_images, *canvas, 3), np.uint8),
                extent,
                np.ones_like(extent, np.float32),
                extent,
            )
            text = Normal((num_words, embed_dim), std=embed_dim**-0.5)
            return state.params, photos, text, np.arange(num_words) < WORDS, limits

        per_image = flops.formula_image(config.model, canvas) + flops.num_anchors(canvas) * num_words * embed_dim
        yield Program(
            f"prediction {num_images} x {_text(canvas)}, {WORDS:,} words", detector.predict, arguments,
            num_images=num_images, flops=lambda n=num_images, each=per_image: 2.0 * n * each,
        )  # fmt: skip


def both_passes(
    name: str,
    function: Callable[..., Any],
    arguments: Callable[[Any], tuple[tuple[Any, ...], tuple[Any, ...]]],
    *,
    num_images: int,
    reference: str = "",
    counted: Callable[..., Any] | None = None,
) -> Iterator[Program]:
    """Yields a function, and the function with its gradient to the first of its two groups of arguments.

    The FLOPs are those of `counted` where it is given: of a function whose form depends on the platform, a count takes
    the dearest one.
    """

    def forward(inner: Any, fixed: Any, function: Callable[..., Any] = function) -> Any:
        return function(*inner, *fixed)

    def both(gradient: Any, inner: Any, fixed: Any, function: Callable[..., Any] = function) -> Any:
        output, vjp = jax.vjp(lambda *arrays: function(*arrays, *fixed), *inner)
        return output, vjp(gradient)

    def with_gradient(state: Any) -> tuple[Any, ...]:
        inner, fixed = jax.tree.map(inputs.shape_of, arguments(state))
        output = jax.eval_shape(forward, inner, fixed)
        return jax.tree.map(lambda x: Normal(x.shape, x.dtype), output), *arguments(state)

    for passes, run, made in (("forward", forward, arguments), ("forward + backward", both, with_gradient)):
        plain = counted and functools.partial(run, function=counted)
        compared = reference and f"{reference}, {passes}"
        yield Program(f"{name}, {passes}", run, made, num_images, counted=plain, reference=compared)


def towers(setting: Setting) -> Iterator[Program]:
    """Yields the parts of a step that have parameters, at the sizes of detection and of pairs."""
    config = setting.config
    plain = config.model.copy_and_resolve_references()
    plain.head.deform_impl = "gather"

    def on(part: Callable[..., Any], model: detclip.DetCLIP = setting.model) -> Callable[..., Any]:
        def function(params: Any, x: Any) -> Any:
            key = jax.random.key(0)
            return model.apply({"params": params}, x, method=part, rngs={"dropout": key})

        return function

    def parameters(state: Any, *names: str) -> Any:
        return {name: state.params[name] for name in (*names, "logit_scale", "logit_bias")}

    for kind in (Kind.DETECTION, Kind.IMAGE_TEXT):
        (height, width), num_images = setting.canvas(kind), setting.chunk(kind)
        size = f"{num_images} x {_text((height, width))}"
        image = Normal((num_images, height, width, 3), setting.dtype)
        channels = config.model.swin.embed_dim
        maps = [
            Normal((num_images, -(-height // stride), -(-width // stride), channels << level), setting.dtype)
            for level, stride in enumerate(STRIDES, start=1)
        ]
        pyramid = [
            Normal((num_images, h, w, config.model.head.channels), setting.dtype)
            for h, w in anchor_lib.level_sizes((height, width))
        ]
        parts = {
            "swin": (lambda module, x: module.image_backbone(x, train=True), image, False),
            "fpn": (lambda module, x: module.pyramid(x), maps, True),
            "head": (lambda module, x: [module.region_head(y, i) for i, y in enumerate(x)], pyramid, True),
        }
        for name, (part, x, to_input) in parts.items():

            def arguments(state: Any, name: str = name, x: Any = x, to_input: bool = to_input) -> Any:
                params = parameters(state, name)
                return ((params, x), ()) if to_input else ((params,), (x,))  # an image has no gradient

            counted = on(part, detclip.from_config(plain))
            yield from both_passes(f"{name} {size}", on(part), arguments, num_images=num_images, counted=counted)

    num_rows, length = inputs.table_rows(config, Kind.IMAGE_TEXT, 0), config.model.text.context_length
    tokens = inputs.tokens(np.full(num_rows, 6.0), length, np.random.default_rng(0))
    yield from both_passes(
        f"text tower {num_rows:,} rows",
        on(lambda module, x: module.encode_text(x)),
        lambda state: ((parameters(state, "text_encoder"),), (tokens,)),
        num_images=setting.config.image_text.batch_size,
    )


def losses(setting: Setting) -> Iterator[Program]:
    """Yields the parts of a step without parameters."""
    config = setting.config
    canvas, num_images = setting.canvas(Kind.GROUNDING), setting.chunk(Kind.GROUNDING)
    num_anchors, embed_dim = flops.num_anchors(canvas), config.model.embed_dim
    detection = functools.cache(functools.partial(inputs.batch, config, Kind.DETECTION, canvas, num_names=NAMES))
    of_device = inputs.table_rows(config, Kind.GROUNDING, 0)
    for num_concepts in (inputs.table_rows(config, Kind.DETECTION, NAMES), of_device, SHARE * of_device):

        def align(embeddings: Any, text: Any, labels: Any, positive: Any, anchor_mask: Any) -> Any:
            return alignment_loss(
                embeddings,
                Concepts(text.astype(embeddings.dtype), *LOGIT),
                concept_mask=jnp.ones(text.shape[0], bool),
                targets=AnchorTargets(anchor_mask, positive, labels[..., None]),
                settings=FocalSettings(config.loss.focal_alpha, config.loss.focal_gamma, config.loss.chunk_bytes),
            )

        def arguments(state: Any, num_concepts: int = num_concepts) -> Any:
            rng, shape = np.random.default_rng(0), (num_images, num_anchors)
            text = Normal((num_concepts, embed_dim), std=embed_dim**-0.5)
            fixed = (
                rng.integers(0, num_concepts, shape, np.int32),
                rng.uniform(size=shape) < 0.005,
                rng.uniform(size=shape) < 0.64,
            )
            return (Normal((*shape, embed_dim), setting.dtype), text), fixed

        yield list(both_passes(
            f"alignment loss {num_images} x {num_anchors:,} anchors x {num_concepts:,} concepts", align, arguments,
            num_images=num_images,
        ))[1]  # fmt: skip

    yield Program(
        f"assignment of boxes {len(detection().image)} x {_text(canvas)}",
        lambda batch: train_step.assign_targets(
            batch, jnp.arange(batch.concept_mask.shape[0]), canvas=canvas,
            max_box_concepts=config.detection.max_box_concepts,
        ),
        lambda state: (detection()._replace(image=np.zeros((), np.uint8)),), len(detection().image),
    )  # fmt: skip
    yield from _of_pairs(setting)


def _of_pairs(setting: Setting) -> Iterator[Program]:
    """Yields the selection of proposals and the contrastive loss."""
    config, canvas = setting.config, setting.canvas(Kind.IMAGE_TEXT)
    settings, embed_dim = config.loss, config.model.embed_dim
    batch = inputs.batch(config, Kind.IMAGE_TEXT, canvas)._replace(image=np.zeros((), np.uint8))
    anchors = anchor_lib.grid(canvas).boxes
    num_images, chunk, num_anchors = len(batch.extent), setting.chunk(Kind.IMAGE_TEXT), len(anchors)
    num_proposals = min(settings.num_proposals, num_anchors)
    text = Normal((len(batch.concept_mask), embed_dim), std=embed_dim**-0.5)

    def select(embeddings: Any, deltas: Any, centerness: Any, text: Any, batch: Batch) -> Any:
        part = jax.tree.map(lambda x: x[:chunk], batch._replace(image=jnp.zeros(num_images)))
        boxes = box_lib.decode_deltas(jnp.broadcast_to(anchors[None], deltas.shape), deltas)
        return proposals.select_proposals(
            Regions(embeddings, deltas, centerness, None),
            boxes,
            Concepts(text, *LOGIT),
            anchor_mask=train_step.anchor_mask(part, anchors),
            table=Table.of(batch.concept_ids, batch.concept_mask),
            captions=Captions(part.caption_concepts, part.caption_mask),
            batch_captions=Captions(batch.caption_concepts, batch.caption_mask),
            settings=proposals.settings_of(settings),
        )

    name = f"selection {chunk} x {num_anchors:,} anchors, {text.shape[0]:,} texts"
    shape = (chunk, num_anchors)
    arrays = (Normal((*shape, embed_dim), setting.dtype), Normal((*shape, 4)), Normal(shape), text, batch)
    yield Program(name + WITHOUT_KERNELS, without_kernels(select), lambda state: arrays, chunk)
    yield Program(name, select, lambda state: arrays, chunk, reference=name + WITHOUT_KERNELS)

    def contrast(regions: Any, text: Any, batch: Batch) -> Any:
        return contrastive.word_region_loss(
            regions,
            text,
            LOGIT[0],
            proposed=contrastive.Proposed(jnp.ones(regions.shape[:2], bool), None),
            table=Table.of(batch.concept_ids, batch.concept_mask),
            captions=Captions(batch.caption_concepts, batch.caption_mask),
            image_mask=batch.image_mask,
            settings=contrastive.settings_of(settings),
        )[0]

    regions = Normal((num_images, num_proposals, embed_dim), setting.dtype)
    yield list(both_passes(
        f"contrastive loss {num_images} x {num_proposals} regions, {text.shape[0]:,} texts", contrast,
        lambda state: ((regions, text), (batch,)), num_images=num_images,
    ))[1]  # fmt: skip


def blocks(setting: Setting) -> Iterator[Program]:
    """Yields window attention, the deformable layer and NMS, each in all its forms."""
    config, num_images = setting.config, setting.chunk(Kind.DETECTION)
    height, width = setting.canvas(Kind.DETECTION)
    of_swin = config.model.swin
    for stage, heads in enumerate(of_swin.num_heads):
        shape = (num_images, -(-height // (4 << stage)), -(-width // (4 << stage)), of_swin.embed_dim << stage)
        name, window = f"window attention {stage + 1} {'x'.join(map(str, shape))}", of_swin.window_size
        for form in ("xla", "auto"):
            attention = swin.WindowAttention(heads, window, window // 2, form, setting.dtype)
            yield from both_passes(
                f"{name}, {form}",
                lambda params, x, attention=attention: attention.apply({"params": params}, x),
                lambda state, stage=stage, shape=shape: (
                    (state.params["swin"][f"stage{stage + 1}_block0"]["attention"], Normal(shape, setting.dtype)), ()
                ),
                num_images=num_images, reference="" if form == "xla" else f"{name}, xla",
            )  # fmt: skip

    h, w = anchor_lib.level_sizes((height, width))[0]
    c = config.model.head.channels
    for form in ("xla", "auto"):
        offsets = Normal((num_images, h, w, 9, 2), limit=deform_conv.BAND_RADIUS - 0.1)
        mask = Normal((num_images, h, w, 9), limit=1.0)
        arrays = (Normal((num_images, h, w, c), setting.dtype), offsets, mask, Normal((3, 3, c, c), setting.dtype))
        name = f"deformable layer {num_images}x{h}x{w}x{c}"
        yield from both_passes(
            f"{name}, {form}", functools.partial(deform_conv.deform_conv2d, impl=form),
            lambda state, arrays=arrays: (arrays, ()), num_images=num_images,
            counted=functools.partial(deform_conv.deform_conv2d, impl="gather"),
            reference="" if form == "xla" else f"{name}, xla",
        )  # fmt: skip

    for num_images, num_boxes, kept in ((8, config.eval.pre_nms, config.eval.max_detections), (384, 1000, 100)):
        rng = np.random.default_rng(0)
        extent = np.full((num_images, 2), height)
        arrays = (inputs.boxes(num_images, num_boxes, extent, rng), Normal((num_images, num_boxes)))
        one = functools.partial(nms, iou_threshold=config.eval.nms_iou, max_outputs=kept)
        yield Program(
            f"nms {num_images} x {num_boxes:,} -> {kept}",
            jax.vmap(one),
            lambda state, arrays=arrays: arrays,
            num_images,
        )
