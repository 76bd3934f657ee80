"""Writes the reference outputs beside this file. Run once, in an environment with torch:

    pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.23.0 open_clip_torch==3.3.0
    python tests/golden/make_fixtures.py [swin] [text] [deform_conv] [boxes] [--full=EXISTING_FOLDER]

Weights and inputs come from `seeded`, keyed by the names of our parameters; the tests make them again. Written are
evenly spaced entries of the outputs and the standard deviation of the whole output; `--full` also writes Swin's
whole outputs to that folder.
"""

import pathlib
import sys
from collections.abc import Iterator

import cases
import numpy as np
import seeded
import torch

FOLDER = pathlib.Path(__file__).parent


# --- Swin

# where each library keeps a part: s is the stage from 0, b the block
SWIN_NAMES = {
    "timm": {
        "patch_embedding": "patch_embed.proj",
        "patch_norm": "patch_embed.norm",
        "merging": lambda s: f"layers.{s}.downsample",
        "block": lambda s, b: f"layers.{s}.blocks.{b}",
        "table": "attn.relative_position_bias_table",
        "qkv": ("attn.qkv",),
        "attention/projection": "attn.proj",
        "norm1": "norm1",
        "norm2": "norm2",
        "mlp_in": "mlp.fc1",
        "mlp_out": "mlp.fc2",
    },
    "torchvision": {
        "patch_embedding": "features.0.0",
        "patch_norm": "features.0.2",
        "merging": lambda s: f"features.{2 * s}",
        "block": lambda s, b: f"features.{2 * s + 1}.{b}",
        "table": "attn.relative_position_bias_table",
        "qkv": ("attn.qkv",),
        "attention/projection": "attn.proj",
        "norm1": "norm1",
        "norm2": "norm2",
        "mlp_in": "mlp.0",
        "mlp_out": "mlp.3",
    },
    "transformers": {
        "patch_embedding": "embeddings.patch_embeddings.projection",
        "patch_norm": "embeddings.norm",
        "merging": lambda s: f"encoder.layers.{s - 1}.downsample",
        "block": lambda s, b: f"encoder.layers.{s}.blocks.{b}",
        "table": "attention.relative_position_bias.relative_position_bias_table",
        "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attention/projection": "attention.o_proj",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp_in": "mlp.fc1",
        "mlp_out": "mlp.fc2",
    },
}


def linear(path: str, inputs: int, outputs: int, *names: str, bias: bool = True) -> Iterator[tuple[str, np.ndarray]]:
    """Yields a linear layer's weights under one name, or split over the outputs under several."""
    kernel = seeded.parameter(f"{path}/kernel", (inputs, outputs)).T
    for name, part in zip(names, np.split(kernel, len(names)), strict=True):
        yield f"{name}.weight", part
    if bias:
        for name, part in zip(names, np.split(seeded.parameter(f"{path}/bias", (outputs,)), len(names)), strict=True):
            yield f"{name}.bias", part


def norm(path: str, width: int, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields a norm's weights."""
    yield f"{name}.weight", seeded.parameter(f"{path}/scale", (width,))
    yield f"{name}.bias", seeded.parameter(f"{path}/bias", (width,))


def swin_weights(library: str, size: cases.SwinSize) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the weights of a backbone under a library's names."""
    names = SWIN_NAMES[library]
    width = size.embed_dim
    kernel = seeded.parameter("swin/patch_embedding/kernel", (4, 4, 3, width))
    yield f"{names['patch_embedding']}.weight", kernel.transpose(3, 2, 0, 1)
    yield f"{names['patch_embedding']}.bias", seeded.parameter("swin/patch_embedding/bias", (width,))
    yield from norm("swin/patch_norm", width, names["patch_norm"])
    for stage, (depth, heads) in enumerate(zip(size.depths, size.num_heads, strict=True)):
        if stage > 0:
            path, name = f"swin/stage{stage + 1}_merging", names["merging"](stage)
            yield from norm(f"{path}/norm", 4 * width, f"{name}.norm")
            yield from linear(f"{path}/reduction", 4 * width, 2 * width, f"{name}.reduction", bias=False)
            width *= 2
        for block in range(depth):
            path, name = f"swin/stage{stage + 1}_block{block}", names["block"](stage, block)
            table = ((2 * size.window_size - 1) ** 2, heads)
            yield f"{name}.{names['table']}", seeded.parameter(f"{path}/attention/relative_position_table", table)
            qkv = [f"{name}.{part}" for part in names["qkv"]]
            yield from linear(f"{path}/attention/qkv", width, 3 * width, *qkv)
            for part, inputs, outputs in (("attention/projection", 1, 1), ("mlp_in", 1, 4), ("mlp_out", 4, 1)):
                yield from linear(f"{path}/{part}", inputs * width, outputs * width, f"{name}.{names[part]}")
            for part in ("norm1", "norm2"):
                yield from norm(f"{path}/{part}", width, f"{name}.{names[part]}")


def swin_model(library: str, size: cases.SwinSize, image: torch.Tensor):
    """Returns (model, its module for the last block of every stage)."""
    depths, heads, window = list(size.depths), list(size.num_heads), size.window_size
    if library == "timm":
        from timm.models.swin_transformer import SwinTransformer

        image_size = tuple(image.shape[2:])
        model = SwinTransformer(
            image_size, embed_dim=size.embed_dim, depths=depths, num_heads=heads, window_size=window
        )
        return model, [layer.blocks[-1] for layer in model.layers]
    if library == "torchvision":
        from torchvision.models.swin_transformer import SwinTransformer

        model = SwinTransformer([4, 4], size.embed_dim, depths, heads, [window, window])
        return model, [model.features[i][-1] for i in (1, 3, 5, 7)]
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        image_size=tuple(image.shape[2:]), embed_dim=size.embed_dim, depths=depths, num_heads=heads, window_size=window
    )
    model = SwinModel(config)
    return model, [layer.blocks[-1] for layer in model.encoder.layers]


def make_swin(full: pathlib.Path | None) -> dict[str, np.ndarray]:
    """Returns the features of stages 2-4 after the output norms, which the libraries do not have."""
    out = {}
    for case in cases.SWIN:
        size = cases.SWIN_SIZES[case.size]
        height, width = case.canvas
        image = torch.from_numpy(seeded.uniform("image", (1, height, width, 3))).permute(0, 3, 1, 2)
        image = torch.nn.functional.pad(image, (0, -width % 4, 0, -height % 4))  # torchvision would drop the rest
        for library in case.libraries:
            print(case.name, library, flush=True)
            model, stages = swin_model(library, size, image)
            load(model.eval(), swin_weights(library, size))
            features = []
            for stage in stages:
                stage.register_forward_hook(lambda module, inputs, output, features=features: features.append(output))
            with torch.inference_mode():
                model(image)
            for stage, feature in list(enumerate(features, start=1))[1:]:
                feature = feature[0] if isinstance(feature, tuple) else feature  # transformers: with attentions
                weights = dict(norm(f"swin/norm{stage}", feature.shape[-1], "norm"))
                weights = [torch.from_numpy(value) for value in weights.values()]
                feature = torch.nn.functional.layer_norm(feature, feature.shape[-1:], *weights).numpy()
                key = f"{case.name}/{library}/stage{stage}"
                out[key], out[f"{key}/std"] = seeded.sample(feature), feature.std()
                if full:
                    np.save(full / f"{key.replace('/', '_')}.npy", feature)
    return out


def load(model: torch.nn.Module, weights: Iterator[tuple[str, np.ndarray]]) -> None:
    """Sets parameters by name; those of a classification head may stay as they are."""
    weights = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in weights}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    heads = ("head.", "norm.", "layernorm.", "visual.", "logit_scale", "relative_position_index", "attn_mask")
    missing = [name for name in missing if not any(part in name for part in heads)]
    if missing or unexpected:
        raise ValueError(f"missing {missing}, unexpected {unexpected}")


# --- text tower


def text_weights(library: str, size: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the weights of a text tower under a library's names; open_clip's are OpenAI's."""
    width, layers, _, joint = cases.TEXT_SIZES[size]
    token = seeded.parameter("text_encoder/token_embedding/embedding", (49_408, width))
    position = seeded.parameter("text_encoder/position_embedding", (cases.TEXT_POSITIONS, width))
    projection = seeded.parameter("text_encoder/projection/kernel", (width, joint))
    hugging_face = library == "transformers"
    if hugging_face:
        yield "text_model.embeddings.token_embedding.weight", token
        yield "text_model.embeddings.position_embedding.weight", position
        yield "text_projection.weight", projection.T
    else:
        yield from (("token_embedding.weight", token), ("positional_embedding", position))
        yield "text_projection", projection
    yield from norm("text_encoder/norm", width, "text_model.final_layer_norm" if hugging_face else "ln_final")
    for i in range(layers):
        path = f"text_encoder/block{i}"
        if hugging_face:
            name = f"text_model.encoder.layers.{i}"
            qkv = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
            parts = ("self_attn.out_proj", "mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2")
        else:
            name = f"transformer.resblocks.{i}"
            qkv = [f"{name}.attn.in_proj_"]
            parts = ("attn.out_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2")
        for key, value in linear(f"{path}/qkv", width, 3 * width, *qkv):
            yield key.replace("_.", "_"), value
        for part, inputs, outputs, theirs in zip(
            ("projection", "mlp_in", "mlp_out"), (1, 1, 4), (1, 4, 1), parts[:3], strict=True
        ):
            yield from linear(f"{path}/{part}", inputs * width, outputs * width, f"{name}.{theirs}")
        for part, theirs in zip(("norm1", "norm2"), parts[3:], strict=True):
            yield from norm(f"{path}/{part}", width, f"{name}.{theirs}")


def make_text(full: pathlib.Path | None) -> dict[str, np.ndarray]:
    """Returns embeddings, not normalised, of rows with [EOS] everywhere."""
    import open_clip
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    out = {}
    tokens = torch.from_numpy(cases.text_tokens()).long()
    for size, (width, layers, heads, joint) in cases.TEXT_SIZES.items():
        config = CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, projection_dim=joint, num_hidden_layers=layers,
            num_attention_heads=heads, bos_token_id=cases.START, eos_token_id=cases.END,
        )  # fmt: skip
        model = CLIPTextModelWithProjection(config).eval()
        load(model, text_weights("transformers", size))
        with torch.inference_mode():
            out[f"{size}/transformers"] = model(tokens).text_embeds.numpy()
        vision = open_clip.model.CLIPVisionCfg(layers=1, width=64)
        text = open_clip.model.CLIPTextCfg(width=width, heads=heads, layers=layers)
        model = open_clip.CLIP(joint, vision, text, quick_gelu=True).eval()
        load(model, text_weights("open_clip", size))
        with torch.inference_mode():
            padded = torch.nn.functional.pad(tokens, (0, cases.TEXT_POSITIONS - tokens.shape[1]))
            out[f"{size}/open_clip"] = model.encode_text(padded).numpy()
    return out


# --- operations


def make_deform_conv(full: pathlib.Path | None) -> dict[str, np.ndarray]:
    """Returns output and gradients of torchvision's deform_conv2d, in our layouts."""
    from torchvision.ops import deform_conv2d

    out = {}
    for size in cases.DEFORM_SIZES:
        for kind in cases.DEFORM_OFFSETS:
            case = cases.deform_case(size, kind)
            b, h, w, _, _ = case.offsets.shape
            features = torch.from_numpy(case.features).permute(0, 3, 1, 2).requires_grad_()
            offsets = torch.from_numpy(case.offsets.reshape(b, h, w, 18)).permute(0, 3, 1, 2).requires_grad_()
            mask = torch.from_numpy(case.mask).permute(0, 3, 1, 2).requires_grad_()
            kernel = torch.from_numpy(case.kernel).permute(3, 2, 0, 1).requires_grad_()
            value = deform_conv2d(features, offsets, kernel, padding=1, mask=mask)
            value.backward(torch.from_numpy(case.gradient).permute(0, 3, 1, 2))
            key = f"{h}x{w}/{kind}"
            out[f"{key}/output"] = value.detach().permute(0, 2, 3, 1).numpy()
            out[f"{key}/features"] = features.grad.permute(0, 2, 3, 1).numpy()
            out[f"{key}/offsets"] = offsets.grad.permute(0, 2, 3, 1).numpy().reshape(case.offsets.shape)
            out[f"{key}/mask"] = mask.grad.permute(0, 2, 3, 1).numpy()
            out[f"{key}/kernel"] = kernel.grad.permute(2, 3, 1, 0).numpy()
    return out


def make_boxes(full: pathlib.Path | None) -> dict[str, np.ndarray]:
    """Returns torchvision's IoU, GIoU and NMS."""
    from torchvision import ops

    a, b = (torch.from_numpy(boxes) for boxes in cases.overlap_boxes())
    out = {"iou": ops.box_iou(a, b).numpy()[::8], "giou": ops.generalized_box_iou(a, b).diagonal().numpy()}
    for kind in cases.NMS_KINDS:
        case = cases.nms_case(kind)
        boxes, scores, classes = (torch.from_numpy(x) for x in case)
        for threshold in (0.3, 0.6):
            out[f"{kind}/{threshold}/agnostic"] = ops.nms(boxes, scores, threshold).numpy()
            # not batched_nms: its shifted boxes lose the last bits
            keep = [
                torch.where(classes == c)[0][ops.nms(boxes[classes == c], scores[classes == c], threshold)]
                for c in range(3)
            ]
            keep = torch.sort(torch.cat(keep)).values
            out[f"{kind}/{threshold}/aware"] = keep[torch.sort(-scores[keep], stable=True).indices].numpy()
    return out


def main() -> None:
    """Writes the fixtures named on the command line, or all."""
    makers = {"swin": make_swin, "text": make_text, "deform_conv": make_deform_conv, "boxes": make_boxes}
    arguments = sys.argv[1:]
    full = next((pathlib.Path(a.removeprefix("--full=")) for a in arguments if a.startswith("--full=")), None)
    torch.set_num_threads(2)
    for name in [a for a in arguments if not a.startswith("--")] or makers:
        np.savez_compressed(FOLDER / f"{name}.npz", **makers[name](full))


if __name__ == "__main__":
    main()
