"""Builders: raw files of a published data set in, one folder of ArrayRecord files out.

`python -m detclipv2_jax.prepare` runs them in parallel and restartably (`shards`); each is also an ordinary TFDS
builder (`record_builder`). What they write is read without TensorFlow by `detclipv2_jax.data.built`.
"""
