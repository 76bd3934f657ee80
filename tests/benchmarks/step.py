"""Training on a CPU against the same in torch: the pyramid, one tower, and whole steps of Swin-T, all in float32.

A step has both towers, the losses with their gradient, and AdamW. The reference is given what ours computes: which
anchors are positive, and which regions are proposed; that costs it nothing.
"""

import itertools

import measure
import numpy as np

CANVAS, PAIR_CANVAS, PAIRS = (800, 1344), (320, 320), 8
DEPTHS, HEADS, WIDTH = (2, 2, 6, 2), (3, 6, 12, 24), 96
CHANNELS, GROUPS, EMBED_DIM, TEXT_WIDTH, LENGTH, NAMES = 256, 32, 512, 512, 16, 365
POSITIVE = 90  # anchors
PROPOSALS = 100  # regions a photo
PYRAMID, TOWER = "pyramid, forward + backward", "tower, 100 x 168, forward + backward"
PAIR_STEP, DETECTION_STEP = f"step, {PAIRS} pairs of 320 x 320", "step, detection, 1 x 800 x 1344"


def ours():
    """Yields the blocks' gradients, then whole steps; boxes last, for they take the most memory."""
    import functools

    import jax
    import jax.numpy as jnp

    from configs import swin_t
    from detclipv2_jax.data.schema import Kind
    from detclipv2_jax.models import fpn
    from detclipv2_jax.models.atss_head import Tower
    from detclipv2_jax.runs import sharding
    from tests.benchmarks import accelerator_inputs, accelerator_programs

    def gradient(module, *inputs):
        variables = jax.jit(module.init)(jax.random.key(0), *inputs)

        def total(variables, *inputs):
            return sum(x.sum() for x in jax.tree.leaves(module.apply(variables, *inputs)))

        function = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))

        def run():
            with jax.set_mesh(mesh):
                jax.block_until_ready(function(variables, *inputs))

        return run

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    yield PYRAMID, gradient(fpn.FPN(CHANNELS), [jnp.moveaxis(x, 1, 3) for x in map(jnp.asarray, features())])
    yield TOWER, gradient(Tower(CHANNELS, 4, GROUPS), jnp.moveaxis(jnp.asarray(map_of(CHANNELS, 8)), 1, 3))

    config = swin_t.get_config("paper_canvases").copy_and_resolve_references()
    config.model.dtype = "float32"
    config.detection.batch_size, config.detection.canvases = 1, (CANVAS,)
    config.image_text.batch_size, config.image_text.canvases = PAIRS, (PAIR_CANVAS,)
    setting = accelerator_programs.Setting(config, mesh)
    steps = {kind: functools.partial(accelerator_programs._step, setting, kind) for kind in Kind}
    for name, kind in ((PAIR_STEP, Kind.IMAGE_TEXT), (DETECTION_STEP, Kind.DETECTION)):
        with jax.set_mesh(mesh):
            program = steps[kind]("")
            step = jax.jit(program.function, donate_argnums=0)
            state, batch = jax.tree.map(accelerator_inputs.made, program.arguments(jax.jit(setting.create)()))
            kept = [state]

            def run(step=step, kept=kept, batch=batch):
                with jax.set_mesh(mesh):
                    state, metrics = step(kept.pop(), batch)
                    kept.append(jax.block_until_ready(state))
                    assert float(metrics["finite"])

            yield name, run


def map_of(channels: int, stride: int) -> np.ndarray:
    """Returns a feature map of the large canvas, NCHW."""
    size = (1, channels, CANVAS[0] // stride, CANVAS[1] // stride)
    return np.random.default_rng(0).standard_normal(size, dtype=np.float32)


def features() -> list[np.ndarray]:
    """Returns what the pyramid is made from."""
    return [map_of(channels * WIDTH, stride) for channels, stride in ((2, 8), (4, 16), (8, 32))]


def reference():
    """Yields the same in torch and torchvision."""
    import torch
    from torch import nn
    from torch.nn import functional
    from torchvision.models.swin_transformer import SwinTransformer
    from torchvision.ops import deform_conv2d, generalized_box_iou_loss, sigmoid_focal_loss

    torch.set_num_threads(1)
    torch.manual_seed(0)

    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.lateral = nn.ModuleList(nn.Conv2d(n * WIDTH, CHANNELS, 1) for n in (2, 4, 8))
            self.output = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, 1 + (i > 2), 1) for i in range(5))

        def forward(self, maps):
            levels = [conv(x) for conv, x in zip(self.lateral, maps, strict=True)]
            for i in (1, 0):
                levels[i] = levels[i] + functional.interpolate(levels[i + 1], size=levels[i].shape[2:])
            levels = [conv(x) for conv, x in zip(self.output, levels, strict=False)]
            for conv in self.output[3:]:
                levels.append(conv(levels[-1]))
            return levels

    def tower():
        parts = ((nn.Conv2d(CHANNELS, CHANNELS, 3, 1, 1, bias=False), _norm()) for _ in range(4))
        return nn.Sequential(*itertools.chain.from_iterable((conv, norm, nn.ReLU()) for conv, norm in parts))

    def _norm():
        return nn.GroupNorm(GROUPS, CHANNELS)

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.box_tower, self.class_tower, self.norm = tower(), tower(), _norm()
            self.steering = nn.Conv2d(CHANNELS, 27, 3, 1, 1)
            nn.init.zeros_(self.steering.weight)
            self.kernel = nn.Parameter(0.01 * torch.randn(CHANNELS, CHANNELS, 3, 3))
            self.embedding = nn.Conv2d(CHANNELS, EMBED_DIM, 3, 1, 1)
            self.boxes, self.centerness = (nn.Conv2d(CHANNELS, n, 3, 1, 1) for n in (4, 1))

        def forward(self, x):
            guide = self.box_tower(x)
            steering = self.steering(guide)
            x = deform_conv2d(x, steering[:, :18], self.kernel, padding=1, mask=steering[:, 18:].sigmoid())
            x = self.class_tower(functional.relu(self.norm(x)))
            found = self.embedding(x), self.boxes(guide), self.centerness(guide)
            return [y.flatten(2).transpose(1, 2) for y in found]

    class Attention(nn.Module):
        """A block of CLIP's text tower."""

        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(TEXT_WIDTH), nn.LayerNorm(TEXT_WIDTH)
            self.qkv, self.projection = nn.Linear(TEXT_WIDTH, 3 * TEXT_WIDTH), nn.Linear(TEXT_WIDTH, TEXT_WIDTH)
            self.mlp_in, self.mlp_out = nn.Linear(TEXT_WIDTH, 4 * TEXT_WIDTH), nn.Linear(4 * TEXT_WIDTH, TEXT_WIDTH)

        def forward(self, x):
            t, length, _ = x.shape
            qkv = self.qkv(self.norm1(x)).view(t, length, 3, 8, -1).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(*qkv, is_causal=True)
            x = x + self.projection(y.transpose(1, 2).flatten(2))
            y = self.mlp_in(self.norm2(x))
            return x + self.mlp_out(y * torch.sigmoid(1.702 * y))

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            swin = SwinTransformer([4, 4], WIDTH, list(DEPTHS), list(HEADS), [7, 7], stochastic_depth_prob=0.2)
            self.swin, self.pyramid, self.head = swin.features, Pyramid(), Head()
            self.norms = nn.ModuleList(nn.LayerNorm(n * WIDTH) for n in (2, 4, 8))
            self.tokens = nn.Embedding(49_408, TEXT_WIDTH)
            self.positions = nn.Parameter(0.01 * torch.randn(LENGTH, TEXT_WIDTH))
            self.text = nn.Sequential(*(Attention() for _ in range(12)), nn.LayerNorm(TEXT_WIDTH))
            self.projection = nn.Linear(TEXT_WIDTH, EMBED_DIM, bias=False)
            self.scale, self.bias = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-4.6))

        def forward(self, image, tokens):
            maps, x = [], image
            for i, stage in enumerate(self.swin):
                x = stage(x)
                if i in (3, 5, 7):
                    maps.append(self.norms[i // 2 - 1](x).permute(0, 3, 1, 2))
            parts = zip(*map(self.head, self.pyramid(maps)), strict=True)
            text = self.text(self.tokens(tokens) + self.positions)[:, 5]
            return *(torch.cat(part, 1) for part in parts), functional.normalize(self.projection(text), dim=-1)

    def gradient(module, inputs):
        def run():
            found = module(inputs)
            leaves = [*module.parameters(), *(inputs if isinstance(inputs, list) else [inputs])]
            torch.autograd.grad(sum(x.sum() for x in (found if isinstance(found, list) else [found])), leaves)

        return run

    yield PYRAMID, gradient(Pyramid(), [torch.from_numpy(x).requires_grad_() for x in features()])
    yield TOWER, gradient(tower(), torch.from_numpy(map_of(CHANNELS, 8)).requires_grad_())

    def training(image, num_texts, loss_of):
        model = Detector()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        tokens = torch.randint(1, 49_000, (num_texts, LENGTH))

        def run():
            optimizer.zero_grad()
            loss_of(model, *model(image, tokens)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 35.0)
            optimizer.step()

        return run

    def pair_loss(model, embeddings, boxes, centerness, text):
        with torch.no_grad():  # which regions are proposed: those most like any text
            best = (embeddings @ text.T).amax(2).topk(PROPOSALS).indices
        regions = embeddings.gather(1, best[..., None].expand(-1, -1, EMBED_DIM))
        logits = torch.einsum("bkd,td->btk", regions, text).amax(2) * model.scale
        of = torch.arange(len(text)) % PAIRS
        return functional.cross_entropy(logits.T, of) + functional.cross_entropy(logits, torch.arange(PAIRS))

    def box_loss(model, embeddings, boxes, centerness, text):
        logits = model.scale * (embeddings @ text.T) + model.bias
        targets = torch.zeros_like(logits)
        targets[0, torch.arange(POSITIVE), torch.arange(POSITIVE)] = 1
        box = boxes[0, :POSITIVE].sigmoid()
        predicted = torch.cat([100 - 50 * box[:, :2], 100 + 50 * box[:, 2:]], 1)
        wanted = torch.tensor([[50.0, 50.0, 150.0, 150.0]]).expand(POSITIVE, 4)
        loss = sigmoid_focal_loss(logits, targets, reduction="sum")
        loss += generalized_box_iou_loss(predicted, wanted, reduction="sum")
        return loss + functional.binary_cross_entropy_with_logits(
            centerness[0, :POSITIVE, 0], torch.full((POSITIVE,), 0.5)
        )

    yield PAIR_STEP, training(torch.randn(PAIRS, 3, *PAIR_CANVAS), PAIRS * 9, pair_loss)
    yield DETECTION_STEP, training(torch.randn(1, 3, *CANVAS), NAMES + 3, box_loss)


if __name__ == "__main__":
    measure.main(ours, reference)
