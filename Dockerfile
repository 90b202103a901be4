# gptray on Ray's image, for Kubernetes (configs/clusters/) and Docker. Build it in this folder with one of:
#
#   docker build -t registry.example.com/gptray:ray-2.60.0-cpu .
#   docker build -t registry.example.com/gptray:ray-2.60.0-cu130 \
#       --build-arg PLATFORM=cu130 --build-arg TORCH=cu130 .      # NVIDIA driver 580 or later
#   docker build -t registry.example.com/gptray:ray-2.60.0-cu126 \
#       --build-arg PLATFORM=cu128 --build-arg TORCH=cu126 .      # CUDA 12, driver 570 or later
ARG RAY_VERSION=2.60.0
# cpu, or the CUDA version of Ray's image; torch brings its own.
ARG PLATFORM=cpu
FROM rayproject/ray:${RAY_VERSION}-py312-${PLATFORM}

# The folder of download.pytorch.org/whl: cpu, or the CUDA version that torch is built for.
ARG TORCH=cpu

# The C++ kernels for CPUs and torch.compile need a compiler; Python.h is in Ray's image.
USER root
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o ray -g users /opt/gptray
USER ray

WORKDIR /opt/gptray
COPY --chown=ray:users pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=ray:users gptray gptray
COPY --chown=ray:users configs configs
RUN pip install --no-cache-dir . -c constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/${TORCH}
WORKDIR /home/ray
