"""The network: Swin backbone, pyramid, ATSS head with a deformable layer, and CLIP's text tower (flax.linen)."""
