# An image with this repository, installed; launch/gke.sh builds it for TPUs (BUILD=1). By hand:
#
#   docker build --build-arg EXTRA=tpu --tag detclip:tpu .        for TPUs
#   docker build --build-arg EXTRA=cuda13 --tag detclip:cuda .    for NVIDIA GPUs: docker run --gpus=all
#
# `docker stop` kills after 10 s, in which a run may not have saved: docker run --stop-timeout=300
#
# CUDA comes with JAX's packages; of the host's NVIDIA software only the driver is needed.
FROM python:3.12-slim

ARG EXTRA=tpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PYTHONUNBUFFERED=1

WORKDIR /detclipv2_jax
COPY . .
RUN pip install --no-cache-dir --editable ".[$EXTRA]"

# no shell: SIGTERM must reach Python
ENTRYPOINT ["python", "-m", "detclipv2_jax"]
CMD ["--help"]
