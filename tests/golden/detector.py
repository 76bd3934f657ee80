"""The detector's image side in torch, in float64: torchvision's Swin, pyramid and deformable convolution, and the ATSS
head after mmdetection's. Read by `make_fixtures.py` alone.

From mmdetection's configuration of ATSS: P6 and P7 are convolutions of P5 and P6 without ReLU
(`add_extra_convs="on_output"`), towers without biases, GroupNorm, one scale a level for the boxes, centerness from the
regression tower. From the paper's section 3.3: a modulated deformable convolution of the pyramid's feature comes first
in the classification branch, its 18 offsets and 9 masks from the last feature of the regression tower.
"""

from __future__ import annotations

import cases
import numpy as np
import seeded
import torch
from torch import nn
from torch.nn import functional
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.ops import FeaturePyramidNetwork, deform_conv2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from detclipv2_jax.convert import layouts

# torchvision's constants of ImageNet, red first
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Swin(nn.Module):
    """torchvision's stages 2-4, each after a layer norm, which the library does not have."""

    def __init__(self, size: cases.SwinSize):
        super().__init__()
        window = [size.window_size] * 2
        self.body = SwinTransformer([4, 4], size.embed_dim, list(size.depths), list(size.num_heads), window)
        self.norms = nn.ModuleList([nn.LayerNorm(size.embed_dim * 2**i) for i in (1, 2, 3)])
        state = {name: value.numpy() for name, value in self.body.state_dict().items()}
        _, params, _ = layouts.from_checkpoint("swin", state, what="the model")
        params = {name: seeded.parameter(name, value.shape) for name, value in params.items()}
        state = layouts.to_checkpoint("swin", params, layout="torchvision", what="the model").params
        self.body.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=False)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        image = functional.pad(image, (0, -image.shape[3] % 4, 0, -image.shape[2] % 4))  # torchvision drops the rest
        x, features = image, []
        for i, part in enumerate(self.body.features):
            x = part(x)
            if i in (3, 5, 7):
                features.append(self.norms[i // 2 - 1](x).permute(0, 3, 1, 2))
        return features

    def gradients(self) -> dict[str, np.ndarray]:
        """Returns the gradients under our names and in our layout."""
        of_head = self.body.state_dict().keys() - dict(self.body.features.named_parameters(prefix="features")).keys()
        state = {name: value.numpy() for name, value in self.body.state_dict().items() if name in of_head}
        state |= {f"features.{name}": p.grad.numpy() for name, p in self.body.features.named_parameters()}
        return layouts.from_checkpoint("swin", state, what="the gradient").params

    def norm_parameters(self) -> dict[str, nn.Parameter]:
        """Returns the parameters of the output norms under our names."""
        norms = {f"swin/norm{stage}": norm for stage, norm in enumerate(self.norms, start=2)}
        return {f"{name}/{ours}": getattr(norm, theirs) for name, norm in norms.items() for ours, theirs in NAMES}


NAMES = (("scale", "weight"), ("bias", "bias"))


class _Extra(ExtraFPNBlock):
    def __init__(self, channels: int):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(2)])

    def forward(self, results, x, names):
        for conv in self.convs:
            results.append(conv(results[-1]))
        return results, [*names, "p6", "p7"]


class Pyramid(nn.Module):
    """P3-P7."""

    def __init__(self, inputs: list[int], channels: int):
        super().__init__()
        self.body = FeaturePyramidNetwork(inputs, channels, extra_blocks=_Extra(channels))

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(self.body({str(i): x for i, x in enumerate(features)}).values())

    def named(self) -> dict[str, nn.Parameter]:
        """Returns the parameters under our names."""
        modules = {f"fpn/lateral{i}": self.body.inner_blocks[i - 3][0] for i in (3, 4, 5)}
        modules |= {f"fpn/output{i}": self.body.layer_blocks[i - 3][0] for i in (3, 4, 5)}
        modules |= {f"fpn/output{i}": self.body.extra_blocks.convs[i - 6] for i in (6, 7)}
        return {f"{name}/{ours}": getattr(m, theirs) for name, m in modules.items() for ours, theirs in CONV}


CONV = (("kernel", "weight"), ("bias", "bias"))


class Head(nn.Module):
    """ATSS' head with a region embedding for classes."""

    def __init__(self, size: cases.HeadSize):
        super().__init__()
        width, groups = size.channels, size.num_groups
        layers = [(tower, i) for tower in ("box_tower", "class_tower") for i in range(size.num_convs)]
        self.convs = nn.ModuleDict(
            {f"{tower}/conv{i}": nn.Conv2d(width, width, 3, 1, 1, bias=False) for tower, i in layers}
        )
        names = [f"{tower}/norm{i}" for tower, i in layers] + ["deformable/norm"]
        self.norms = nn.ModuleDict({name: nn.GroupNorm(groups, width) for name in names})
        outputs = {"deformable/steering": 27, "box_deltas": 4, "centerness": 1, "embedding": size.embed_dim}
        if size.objectness != "none":
            outputs["objectness"] = 1
        self.outputs = nn.ModuleDict({name: nn.Conv2d(width, count, 3, 1, 1) for name, count in outputs.items()})
        self.kernel = nn.Parameter(torch.zeros(width, width, 3, 3))
        self.scales = nn.Parameter(torch.zeros(5))
        self.size = size

    def _tower(self, x: torch.Tensor, name: str) -> torch.Tensor:
        for i in range(self.size.num_convs):
            x = functional.relu(self.norms[f"{name}/norm{i}"](self.convs[f"{name}/conv{i}"](x)))
        return x

    def forward(self, feature: torch.Tensor, level: int) -> dict[str, torch.Tensor]:
        """Returns [b, cells, ...] of every output."""
        boxes = self._tower(feature, "box_tower")
        offsets, mask = self.outputs["deformable/steering"](boxes).split([18, 9], dim=1)
        classes = deform_conv2d(feature, offsets, self.kernel, padding=1, mask=mask.sigmoid())
        classes = self._tower(functional.relu(self.norms["deformable/norm"](classes)), "class_tower")
        found = {
            "embeddings": self.outputs["embedding"](classes),
            "box_deltas": self.outputs["box_deltas"](boxes) * self.scales[level],
            "centerness": self.outputs["centerness"](boxes),
        }
        if self.size.objectness != "none":
            found["objectness"] = self.outputs["objectness"](boxes)
        found = {name: x.flatten(2).transpose(1, 2) for name, x in found.items()}
        return found | {name: found[name][..., 0] for name in ("centerness", "objectness") if name in found}

    def named(self) -> dict[str, nn.Parameter]:
        """Returns the parameters under our names."""
        found = {f"head/{name}/kernel": conv.weight for name, conv in self.convs.items()}
        found |= {f"head/{name}/{ours}": getattr(m, t) for name, m in self.norms.items() for ours, t in NAMES}
        found |= {f"head/{name}/{ours}": getattr(m, t) for name, m in self.outputs.items() for ours, t in CONV}
        return found | {"head/deformable/kernel": self.kernel, "head/level_scales": self.scales}


def fill(parameters: dict[str, nn.Parameter]) -> None:
    """Sets parameters to the seeded values of our names."""
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)
        ours = (*shape[2:], shape[1], shape[0]) if len(shape) == 4 else shape
        value = torch.from_numpy(seeded.parameter(name, ours))
        parameter.data = (value.permute(3, 2, 0, 1) if len(shape) == 4 else value).double().contiguous()


def gradients(parameters: dict[str, nn.Parameter]) -> dict[str, np.ndarray]:
    """Returns the gradients in our layout."""
    return {
        name: (p.grad.permute(2, 3, 1, 0) if p.ndim == 4 else p.grad).numpy() for name, p in parameters.items()
    }  # fmt: skip


def nchw(x: np.ndarray) -> torch.Tensor:
    """Returns a map of ours as a float64 leaf in torch's layout."""
    return torch.from_numpy(x).double().permute(0, 3, 1, 2).contiguous().requires_grad_()


def nhwc(x: torch.Tensor) -> np.ndarray:
    """Returns a map of torch's in our layout."""
    return x.detach().permute(0, 2, 3, 1).numpy()


def weighted_sum(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the scalar whose gradients are compared: every output times fixed random numbers."""
    weights = {name: torch.from_numpy(seeded.uniform(f"above/{name}", tuple(x.shape))) for name, x in outputs.items()}
    return sum((x * weights[name]).sum() for name, x in outputs.items())


def swin(case: cases.GradientCase) -> dict[str, np.ndarray]:
    """Returns features and gradients of the backbone."""
    model = Swin(case.swin)
    fill(model.norm_parameters())
    model.double().eval()
    image = nchw(seeded.uniform("image", (2, *case.canvas, 3)))
    features = {f"feature{i}": x.permute(0, 2, 3, 1) for i, x in enumerate(model(image), start=2)}
    weighted_sum(features).backward()
    found = model.gradients() | gradients(model.norm_parameters()) | {"image": nhwc(image.grad)}
    return {name: x.detach().numpy() for name, x in features.items()} | _prefixed("gradient", found)


def pyramid(case: cases.GradientCase) -> dict[str, np.ndarray]:
    """Returns levels and gradients of the pyramid."""
    model = Pyramid([x.shape[-1] for x in case.features()], case.head.channels)
    fill(model.named())
    features = [nchw(x) for x in case.features()]
    levels = {f"level{i}": x.permute(0, 2, 3, 1) for i, x in enumerate(model.double()(features), start=3)}
    weighted_sum(levels).backward()
    found = gradients(model.named()) | {f"feature{i}": nhwc(x.grad) for i, x in enumerate(features, start=3)}
    return {name: x.detach().numpy() for name, x in levels.items()} | _prefixed("gradient", found)


def head(case: cases.GradientCase) -> dict[str, np.ndarray]:
    """Returns outputs and gradients of the head on two levels."""
    model = Head(case.head).double()
    fill(model.named())
    levels = {i: nchw(x) for i, x in case.levels().items()}
    outputs = {f"{name}{i}": x for i, level in levels.items() for name, x in model(level, i).items()}
    weighted_sum(outputs).backward()
    found = gradients(model.named()) | {f"level{i}": nhwc(x.grad) for i, x in levels.items()}
    return {name: x.detach().numpy() for name, x in outputs.items()} | _prefixed("gradient", found)


def whole(case: cases.GradientCase) -> dict[str, np.ndarray]:
    """Returns the regions of images with padding and the gradients of all parameters of the image side."""
    backbone, embed_dim = Swin(case.swin), case.swin.embed_dim
    neck = Pyramid([2 * embed_dim, 4 * embed_dim, 8 * embed_dim], case.head.channels)
    top = Head(case.head)
    parameters = backbone.norm_parameters() | neck.named() | top.named()
    fill(parameters)
    for module in (backbone, neck, top):
        module.double().eval()
    images, extents = case.images()
    x = torch.from_numpy(images).double().permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(MEAN).double()[None, :, None, None]) / torch.tensor(STD).double()[None, :, None, None]
    for image, (height, width) in zip(x, extents, strict=True):
        image[:, height:], image[:, :, width:] = 0, 0
    outputs = [top(level, i) for i, level in enumerate(neck(backbone(x)))]
    outputs = {name: torch.cat([output[name] for output in outputs], dim=1) for name in outputs[0]}
    weighted_sum(outputs).backward()
    found = backbone.gradients() | gradients(parameters)
    return {name: x.detach().numpy() for name, x in outputs.items()} | _prefixed("gradient", found)


def _prefixed(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}": value for name, value in arrays.items()}
