"""DetCLIPv2 open-vocabulary detection pre-training in JAX/Flax."""
