# The environment of a GPU cluster: NVIDIA's PyTorch image, whose torch, Transformer Engine and NCCL stay as they are.
# Megatron-Core 0.16.1 takes Transformer Engine 2.9 to 2.11; release 25.12 of the image brings one of these. Not built in CI.
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
    && python -c "import importlib.metadata as m, megatron.core; print(m.version('torch'), m.version('transformer_engine'))"

ENV TOKENIZERS_PARALLELISM=false
