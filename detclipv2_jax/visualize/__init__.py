"""Pictures of what a model is trained on, finds and matches; `python -m detclipv2_jax.visualize` draws from files."""
