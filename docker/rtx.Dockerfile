# syntax=docker/dockerfile:1
# The server for engines of TensorRT-RTX, for RTX GPUs and L40S. Build it in the root of a checkout:
#
#   docker build -f docker/rtx.Dockerfile -t live-avatar-rtx:0.1.0 .
#
# 26.07 carries Triton 2.71.0, as docker/Dockerfile does: nvidia-pytriton's knows no GPU. The image's own TensorRT stays unused.
# A node needs a driver of branch 580 or newer. Not built by anyone here: there was no Docker and no GPU.
#
# TensorRT-RTX is under NVIDIA's licence, which does not name its libraries among those that may be passed on (docs/rtx.md):
# build this image for yourself, and push it to no public registry. Holds no weights and downloads none: artifacts with
# their engines are a volume.
FROM nvcr.io/nvidia/tritonserver:26.07-py3

# Another index: --build-arg PIP_INDEX_URL=...
ARG PIP_INDEX_URL

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

# The packages of others first: this layer stays when only the code changes. Without nvidia-pytriton, whose Triton knows no
# GPU and would be taken before the image's. `pip --python` fills an environment that has no pip: Ubuntu's python3 has no
# ensurepip.
COPY constraints.txt pyproject.toml ./
COPY client/pyproject.toml client/
COPY docker/requirements.py docker/
RUN python3 -m venv --without-pip /opt/venv \
 && python docker/requirements.py --without nvidia-pytriton --extra tensorrt-rtx > /opt/requirements.txt \
 && pip --python /opt/venv/bin/python install -r /opt/requirements.txt

COPY . .
RUN pip --python /opt/venv/bin/python install --no-deps -e ./client -e . \
 && python -m compileall -q client export live_avatar model_repository training

USER 10001:10001
EXPOSE 8000 8001 8002 8003
ENTRYPOINT ["live-avatar"]
CMD ["--help"]
