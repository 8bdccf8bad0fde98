# One image for the Ray head, its workers and both stages: the Ray versions of a cluster agree because there is only one.
# `object-store` is the S3 gateway with a folder that a user without rights may write to. See docs/docker.md.

FROM python:3.11.15-slim-bookworm AS build
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never VIRTUAL_ENV=/opt/venv
WORKDIR /source
COPY requirements.lock pyproject.toml ./
# The lock holds uv too, with its hashes: pip installs that, and uv installs the rest.
RUN awk '/^[^ ]/ { wanted = /^uv==/ } wanted' requirements.lock > uv.lock \
    && python -m venv /opt/tools \
    && /opt/tools/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps --require-hashes --requirement uv.lock
# As a constraint, the lock pins and verifies what the product needs and leaves out what only developers need.
RUN --mount=type=cache,target=/root/.cache/uv \
    python -m venv --without-pip /opt/venv \
    && /opt/tools/bin/uv pip install --require-hashes --constraint requirements.lock \
        --requirement pyproject.toml --extra s3
COPY LICENSE README.md ./
COPY pipeline pipeline
COPY teacher teacher
COPY student student
COPY manifests manifests
RUN /opt/tools/bin/uv build --no-cache --wheel --require-hashes --build-constraint requirements.lock --out-dir /wheel . \
    && /opt/tools/bin/uv pip install --no-cache --no-deps /wheel/*.whl

FROM python:3.11.15-slim-bookworm AS pipeline
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin distill \
    && install --directory --owner=distill --group=distill /runs /home/distill/.cache
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH MPLCONFIGDIR=/tmp/matplotlib PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
WORKDIR /runs
CMD ["pipeline", "--help"]

FROM versity/versitygw:v1.8.0 AS object-store
# A new volume takes over the image's folder and its owner; a folder in it is a bucket, here `distill`.
RUN mkdir -p /objects/distill && chown -R 10001:10001 /objects
USER 10001:10001
