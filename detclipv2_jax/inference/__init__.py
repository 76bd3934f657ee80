"""From regions and words to boxes, for arrays (`detect`), compiled models (`Detector`) and any image (`Predictor`)."""

from detclipv2_jax.inference.detect import WORD_CHUNK, Alignment, Detections, Limits, Photos
from detclipv2_jax.inference.detector import Detector
from detclipv2_jax.inference.found import Found
from detclipv2_jax.inference.predictor import Predictor
from detclipv2_jax.inference.vocabulary import parse_words

__all__ = [
    "WORD_CHUNK", "Alignment", "Detections", "Detector", "Found", "Limits", "Photos", "Predictor", "parse_words",
]  # fmt: skip
