# The environment of a GPU cluster: NVIDIA's PyTorch image, whose torch, Transformer Engine and NCCL stay as they are.
# It must bring Transformer Engine 2.10 or newer, which is checked at the end. Not built in CI.
#   docker build -t megatron-oprd .
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE}

WORKDIR /opt/megatron_oprd
COPY pyproject.toml README.md LICENSE ./
COPY megatron_oprd megatron_oprd
COPY examples examples
COPY tools tools

# What the image brings is pinned to what it brings: pip may not replace it.
RUN pip list --format=freeze | grep -iE '^(torch|torchvision|triton|pytorch-triton|numpy|flash[-_]attn|transformer[-_]engine.*|nvidia-.*)==' \
      > /tmp/constraints.txt \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt "megatron-core==0.16.1" --editable . \
    && rm /tmp/constraints.txt \
    && python -c "import importlib.metadata as m, megatron.core; from packaging.version import Version as V; \
te = m.version('transformer_engine'); print(m.version('torch'), te); assert V(te) >= V('2.10'), te"

ENV TOKENIZERS_PARALLELISM=false
