# GPU:  docker build -t diffusion-ode .
# CPU:  docker build -t diffusion-ode --build-arg BASE=python:3.12-slim --build-arg REQUIREMENTS=requirements.txt .
# The build ends with a tiny run on the CPU, so an image that exists works. See docs/cluster.md for how to run it.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}

ARG REQUIREMENTS=requirements-gpu.txt
# The CUDA image has no Python, and the Python image has no make.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && (python3 -m venv --help > /dev/null 2>&1 || apt-get install --yes --no-install-recommends python3 python3-venv) \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY Makefile requirements*.txt ./
RUN make setup && .venv/bin/python -m pip install --no-cache-dir -r ${REQUIREMENTS}

COPY . .
RUN JAX_PLATFORMS=cpu make smoke && rm -rf runs .cache

# Mount the data and the runs: -v /data:/app/assets -v /runs:/app/runs. `docker stop` sends SIGTERM, a request to stop.
ENTRYPOINT ["/app/.venv/bin/python", "main.py"]
CMD ["--help"]
