"""Writes the reference outputs beside this file. Run once, in an environment with torch:

    pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.23.0 open_clip_torch==3.3.0 jaxtyping \
      absl-py ml_collections ml_dtypes
    PYTHONPATH=. python tests/golden/make_fixtures.py [--full=FOLDER] [PART ...]

PART is swin, text, layouts, deform_conv, boxes or gradients; without one, all are made.

Weights and inputs come from `seeded`, keyed by the names of our parameters (of a library's parameters for `layouts`);
the tests make them again. Written are evenly spaced entries of the outputs and the standard deviation of the whole
output; `--full` also writes Swin's whole outputs to that folder, which must exist.
"""

import json
import pathlib
import re
import sys
import tempfile

import cases
import detector
import numpy as np
import seeded
import torch
from safetensors.torch import load_file, save_file

from detclipv2_jax.convert import layouts

FOLDER = pathlib.Path(__file__).parent


# --- Swin


def seeded_weights(part: str, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns the weights of a library's model, seeded under our names."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    layout, params, _ = layouts.from_checkpoint(part, state, what="the model")
    params = {name: seeded.parameter(name, value.shape) for name, value in params.items()}
    return layouts.to_checkpoint(part, params, layout=layout, what="the model").params


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


def swin_features(model: torch.nn.Module, blocks: list[torch.nn.Module], image: torch.Tensor) -> dict[int, np.ndarray]:
    """Returns the features of stages 2-4 after the output norms, which the libraries do not have."""
    features = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, output: features.append(output)) for block in blocks[1:]
    ]
    with torch.inference_mode():
        model(image)
    for hook in hooks:
        hook.remove()
    out = {}
    for stage, feature in enumerate(features, start=2):
        feature = feature[0] if isinstance(feature, tuple) else feature  # transformers: with attentions
        width = feature.shape[-1:]
        norm = (torch.from_numpy(seeded.parameter(f"swin/norm{stage}/{leaf}", width)) for leaf in ("scale", "bias"))
        out[stage] = torch.nn.functional.layer_norm(feature, width, *norm).numpy()
    return out


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
            load(model.eval(), seeded_weights("swin", model))
            for stage, feature in swin_features(model, stages, image).items():
                key = f"{case.name}/{library}/stage{stage}"
                out[key], out[f"{key}/std"] = seeded.sample(feature), feature.std()
                if full:
                    np.save(full / f"{key.replace('/', '_')}.npy", feature)
    return out


def load(model: torch.nn.Module, weights: dict[str, np.ndarray]) -> None:
    """Sets parameters by name; those of a classification head may stay as they are."""
    weights = {name: torch.from_numpy(value) for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    heads = ("head.", "norm.", "layernorm.", "visual.", "logit_scale", "relative_position_index", "attn_mask")
    missing = [name for name in missing if not any(part in name for part in heads)]
    if missing or unexpected:
        raise ValueError(f"missing {missing}, unexpected {unexpected}")


# --- text tower


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
        load(model, seeded_weights("clip_text", model))
        with torch.inference_mode():
            out[f"{size}/transformers"] = model(tokens).text_embeds.numpy()
        vision = open_clip.model.CLIPVisionCfg(layers=1, width=64)
        text = open_clip.model.CLIPTextCfg(width=width, heads=heads, layers=layers)
        model = open_clip.CLIP(joint, vision, text, quick_gelu=True).eval()
        load(model, seeded_weights("clip_text", model))
        with torch.inference_mode():
            padded = torch.nn.functional.pad(tokens, (0, cases.TEXT_POSITIONS - tokens.shape[1]))
            out[f"{size}/open_clip"] = model.encode_text(padded).numpy()
    return out


def text_gradients() -> dict[str, np.ndarray]:
    """Returns embeddings of open_clip's nano text tower and their gradients, in float64, under our names."""
    import open_clip

    width, layers, heads, joint = cases.TEXT_SIZES["nano"]
    vision = open_clip.model.CLIPVisionCfg(layers=1, width=64)
    text = open_clip.model.CLIPTextCfg(width=width, heads=heads, layers=layers)
    model = open_clip.CLIP(joint, vision, text, quick_gelu=True).eval()
    load(model, seeded_weights("clip_text", model))
    model.double()
    tokens = torch.from_numpy(cases.text_tokens()).long()
    length = tokens.shape[1]
    outputs = {"embeddings": model.encode_text(torch.nn.functional.pad(tokens, (0, cases.TEXT_POSITIONS - length)))}
    detector.weighted_sum(outputs).backward()
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    state |= {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    found = layouts.from_checkpoint("clip_text", state, what="the gradient").params
    position = found["text_encoder/position_embedding"]
    assert not position[length:].any()  # ours are 16
    found["text_encoder/position_embedding"] = position[:length]
    found = {f"gradient/{name}": value for name, value in found.items()}
    return {name: value.detach().numpy() for name, value in outputs.items()} | found


# --- checkpoints as the libraries write them: weights seeded under THEIR names, so that our table of names is tested


def make_layouts(full: pathlib.Path | None) -> dict[str, np.ndarray]:
    """Returns features of checkpoints in every layout; writes their names and shapes to layouts.json."""
    names: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {"swin": {}, "clip_text": {}}
    out = {}

    def checkpoint(part: str, layout: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shapes = names[part][layout] = {name: tuple(value.shape) for name, value in state.items()}
        return {
            name: torch.from_numpy(seeded.foreign(name, shapes[name])) if value.is_floating_point() else value
            for name, value in state.items()
        }

    from timm.models.swin_transformer import checkpoint_filter_fn
    from transformers import SwinForImageClassification, SwinModel

    image = torch.from_numpy(seeded.uniform("image", (1, *cases.LAYOUT_CANVAS, 3))).permute(0, 3, 1, 2)
    for layout in ("microsoft", "timm", "torchvision", "transformers", "transformers_modules"):
        library = {"microsoft": "timm", "transformers_modules": "transformers"}.get(layout, layout)
        model, blocks = swin_model(library, cases.LAYOUT_SWIN, image)
        model.eval()
        if layout == "microsoft":
            model.load_state_dict(checkpoint_filter_fn(checkpoint("swin", layout, microsoft_state(model)), model))
        elif layout == "transformers":
            classifier = SwinForImageClassification(model.config)
            model = resaved(classifier, SwinModel, lambda state: checkpoint("swin", "transformers", state))
            blocks = [layer.blocks[-1] for layer in model.encoder.layers]
        else:
            model.load_state_dict(checkpoint("swin", layout, model.state_dict()))
        for stage, feature in swin_features(model, blocks, image).items():
            out[f"swin/{layout}/stage{stage}"] = seeded.sample(feature)

    import open_clip
    from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection

    width, layers, heads, joint = cases.LAYOUT_TEXT
    tokens = torch.from_numpy(cases.text_tokens()).long()
    padded = torch.nn.functional.pad(tokens, (0, cases.TEXT_POSITIONS - tokens.shape[1]))
    vision = open_clip.model.CLIPVisionCfg(layers=1, width=64, image_size=32, patch_size=16)
    text = open_clip.model.CLIPTextCfg(width=width, heads=heads, layers=layers)
    for layout, kind in (("open_clip", open_clip.CLIP), ("open_clip_custom", open_clip.CustomTextCLIP)):
        model = kind(joint, vision, text, quick_gelu=True).eval()
        model.load_state_dict(checkpoint("clip_text", layout, model.state_dict()))
        with torch.inference_mode():
            out[f"clip_text/{layout}"] = model.encode_text(padded).numpy()
    state = open_clip.CLIP(joint, vision, text, quick_gelu=True).state_dict()
    state |= {name: torch.tensor(77) for name in ("input_resolution", "context_length", "vocab_size")}
    state = {name: value.half() for name, value in checkpoint("clip_text", "openai", state).items()}
    model = open_clip.model.build_model_from_openai_state_dict(dict(state), cast_dtype=torch.float32).float()
    with torch.inference_mode():
        out["clip_text/openai"] = model.encode_text(padded).numpy()

    side = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 64, "intermediate_size": 256}
    ends = {"bos_token_id": cases.START, "eos_token_id": cases.END}
    config = CLIPConfig(
        text_config=side | ends | {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width},
        vision_config=side | {"image_size": 32, "patch_size": 16},
        projection_dim=joint,
    )
    config.text_config.projection_dim = joint
    model = resaved(
        CLIPModel(config), CLIPTextModelWithProjection, lambda state: checkpoint("clip_text", "transformers", state)
    )
    with torch.inference_mode():
        out["clip_text/transformers"] = model(tokens).text_embeds.numpy()
    (FOLDER / "layouts.json").write_text(json.dumps(names).replace("}, ", "},\n") + "\n")
    for old, new in cases.TABLE_WINDOWS:
        table = torch.from_numpy(cases.relative_position_table(old)).T.reshape(1, -1, 2 * old - 1, 2 * old - 1)
        table = torch.nn.functional.interpolate(table, size=(2 * new - 1, 2 * new - 1), mode="bicubic")
        out[f"table/{old}/{new}"] = table.reshape(table.shape[1], -1).T.numpy()
    return out


def microsoft_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the state of timm's model under the names of the Swin repository, whose buffers are stored too."""
    state = {}
    for name, value in model.state_dict().items():
        if match := re.match(r"layers\.(\d)\.downsample(.*)", name):
            name = f"layers.{int(match[1]) - 1}.downsample{match[2]}"
        state[name.replace("head.fc.", "head.")] = value
        if name.endswith("relative_position_bias_table"):
            state[name.replace("bias_table", "index")] = torch.zeros(4, 4)
    return state | {"layers.1.blocks.1.attn_mask": torch.zeros(16, 4, 4)}


def resaved(model, kind, fill):
    """Returns a model of another kind, read from the files of one of transformers after `fill` has changed them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = f"{folder}/model.safetensors"
        save_file(fill(load_file(path)), path, metadata={"format": "pt"})
        return kind.from_pretrained(folder).eval()


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


def make_gradients(full: pathlib.Path | None) -> dict[str, np.ndarray]:
    """Returns digests of outputs and gradients of backbone, pyramid, head, the whole image side and the text tower."""
    case = cases.PARTS["classification"]
    found = {"swin": detector.swin(case), "pyramid": detector.pyramid(case), "detector": detector.whole(cases.WHOLE)}
    found |= {f"head_{objectness}": detector.head(case) for objectness, case in cases.PARTS.items()}
    found["text"] = text_gradients()
    out = {}
    for part, arrays in found.items():
        names = sorted(arrays)
        out[f"{part}/names"] = np.array(names)
        out[f"{part}/digests"] = np.stack([seeded.digest(name, arrays[name]) for name in names])
    return out


def main() -> None:
    """Writes the fixtures named on the command line, or all."""
    makers = {
        "swin": make_swin,
        "text": make_text,
        "layouts": make_layouts,
        "deform_conv": make_deform_conv,
        "boxes": make_boxes,
        "gradients": make_gradients,
    }
    arguments = sys.argv[1:]
    full = next((pathlib.Path(a.removeprefix("--full=")) for a in arguments if a.startswith("--full=")), None)
    torch.set_num_threads(2)
    for name in [a for a in arguments if not a.startswith("--")] or makers:
        np.savez_compressed(FOLDER / f"{name}.npz", **makers[name](full))


if __name__ == "__main__":
    main()
