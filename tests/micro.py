"""The configuration that tests train and trace with."""

from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib


def micro_config() -> ConfigDict:
    """A configuration of the real architecture, as small as it gets, on a generated world of 64 px scenes."""
    c = config_lib.base()
    c.name = "micro"
    c.epochs = 50
    c.model = config_lib.model("nano")
    c.model.embed_dim = 16
    c.model.swin.embed_dim = 8
    c.model.swin.depths = (1, 1, 1, 1)
    c.model.swin.num_heads = (1, 1, 2, 2)
    c.model.head.channels = 16
    c.model.head.num_convs = 1
    c.model.head.num_groups = 4
    c.model.text.width = 16
    c.model.text.num_layers = 1
    c.model.text.num_heads = 1
    c.scenes.num_detection = c.scenes.num_grounding = c.scenes.num_image_text = 24
    c.scenes.num_eval = 12
    c.scenes.size_px = 64
    for kind in config_lib.KINDS:
        c[kind].canvases = ((64, 64),)
        c[kind].short_side = (48, 64)
        c[kind].long_side = 64
        c[kind].batch_size = 8
    c.detection.definitions = c.eval.definitions = False
    c.detection.max_boxes = c.grounding.max_boxes = 8
    c.detection.num_concepts = c.grounding.num_concepts = 12
    c.eval.canvases = ((64, 64),)
    c.eval.short_side = c.eval.long_side = 64
    c.eval.batch_size = 8
    c.eval.num_pictures = 1
    c.loss.num_proposals = 8
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 50
    c.log_every_steps = 1
    c.checkpoint.every_steps = 100
    return c
