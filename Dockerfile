# medvqa-rl for a CPU; for CUDA give another base and another index of torch (docs/install.md):
#   docker build -t medvqa-rl:cuda --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
ARG BASE=debian:trixie-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# Python of Debian 13 and Ubuntu 24.04, whichever release of it the base has. Chromium and compilers: only for tests.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# torch first and by itself: it changes rarely, and only it comes from that index.
WORKDIR /opt/medvqa-rl
COPY constraints.txt ./
RUN pip install -c constraints.txt --index-url "$TORCH_INDEX" torch

COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install -c constraints.txt '.[excel,hub,dicom,nifti,judge,serve]'

# Runs, settings and data are mounted; nothing in the image is written.
RUN useradd --create-home --uid 10001 medvqa && mkdir /home/medvqa/runs && chown medvqa /home/medvqa/runs
COPY configs /home/medvqa/configs
USER 10001
WORKDIR /home/medvqa
ENTRYPOINT ["medvqa-rl"]
CMD ["--help"]
