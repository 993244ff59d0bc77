# `make image` builds this without a daemon. BASE: any image of Debian or Ubuntu whose Python is 3.11 or newer.
ARG BASE=docker.io/library/debian:bookworm-slim
# hadolint ignore=DL3006
FROM ${BASE}

# Triton compiles its launcher when the engine starts: that takes a C compiler and Python's headers in the image.
# Versions are those of the base's release: pinning them would break every build after a security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/blockserve/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# Dependencies first: their layer, by far the largest, is made again only when these two files change.
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN python3 -m venv /opt/blockserve \
    && python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && pip install --quiet -c constraints.txt -r requirements.txt

COPY README.md LICENSE ./
COPY kernels ./kernels
COPY engine ./engine
COPY server ./server
RUN pip install --quiet --no-deps . && rm -rf /build

# Its home holds what is cached: compiled kernels (.triton) and models of the hub (.cache/huggingface).
RUN useradd --create-home --home-dir /var/lib/blockserve --uid 10001 blockserve
USER 10001
WORKDIR /var/lib/blockserve

# Read by NVIDIA's container runtime, where there is one.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    BLOCKSERVE_HOST=0.0.0.0 \
    BLOCKSERVE_PORT=8000
EXPOSE 8000

HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"BLOCKSERVE_PORT\"]}/health', timeout=4)"]

# No init in between: the supervisor answers SIGTERM itself, by a drain, and waits for its children.
ENTRYPOINT ["blockserve"]
CMD ["serve"]
