# Image for GPU nodes: docker build -t REGISTRY/maskclip:VERSION .
# PyTorch's wheels bring CUDA's libraries; the node brings the driver and the NVIDIA container toolkit.
FROM python:3.11-slim-bookworm

# gcc: triton compiles kernels when they are first used. wget, procps: KubeRay's probes and ray call them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev procps wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/maskclip
COPY setup.py pyproject.toml README.md LICENSE NOTICE ./
COPY requirements/lock.txt requirements/lock.txt
COPY cluster cluster
COPY data_pipeline data_pipeline
COPY model model
COPY system system
COPY configs configs
RUN pip install --no-cache-dir -c requirements/lock.txt ".[gpu]" \
    && useradd --create-home --home-dir /var/lib/maskclip --uid 1000 maskclip
USER 1000
WORKDIR /var/lib/maskclip
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PYTHONUNBUFFERED=1
CMD ["maskclip", "--help"]
