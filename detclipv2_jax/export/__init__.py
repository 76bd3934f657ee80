"""A checkpoint written for programs without this package: safetensors, StableHLO, SavedModel."""
