# syntax=docker/dockerfile:1
# The server for the profile `cpu`: no GPU, no TensorRT. Build it in the root of a checkout:
#
#   docker build -f docker/cpu.Dockerfile -t live-avatar-cpu:0.1.0 .
#
# Triton itself comes with the nvidia-pytriton wheel, 2.51. Holds no weights and downloads none: artifacts are a volume.
# All that these lines write is below /opt, which is how tests/k8s/test_image.py runs them without Docker.
FROM python:3.11.15-slim-bookworm

# Another index: --build-arg PIP_INDEX_URL=...; the extra one has torch without CUDA.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

WORKDIR /opt/live-avatar
# HOME and USER are for what looks them up: the user below stands in no /etc/passwd. PIP_BUILD_CONSTRAINT is what newer
# versions of pip call PIP_CONSTRAINT where a package is built.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    USER=live-avatar \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CONSTRAINT=/opt/live-avatar/constraints.txt \
    PIP_BUILD_CONSTRAINT=/opt/live-avatar/constraints.txt

# The packages of others first: this layer stays when only the code changes.
COPY constraints.txt pyproject.toml ./
COPY client/pyproject.toml client/
COPY docker/requirements.py docker/
RUN python3 -m venv /opt/venv \
 && python docker/requirements.py > /opt/requirements.txt \
 && python -m pip install -r /opt/requirements.txt

COPY . .
RUN python -m pip install --no-deps -e ./client -e . \
 && python -m compileall -q client export live_avatar model_repository training

USER 10001:10001
EXPOSE 8000 8001 8002 8003
ENTRYPOINT ["live-avatar"]
CMD ["--help"]
