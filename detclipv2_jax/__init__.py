"""DetCLIPv2 open-vocabulary detection pre-training in JAX/Flax."""

__version__ = "0.1.0"
