# The trained network behind TensorFlow Serving, and behind the embedded server:
#
#     docker build --tag fashion-cnn .                                  TensorFlow Serving (x86-64)
#     docker build --tag fashion-cnn:embedded --target embedded .       the embedded server (arm64 as well)
#
# and what trains it: `docker build --tag fashion-cnn:training --target training .`
#
# Where packages come from an index of your own, hand pip's configuration over as a secret, which no image keeps:
# `--secret id=pip_config,src=$HOME/.config/pip/pip.conf`.
#
# A tag can be moved to another image, a digest cannot. `docker buildx imagetools inspect tensorflow/serving:2.20.0` prints
# the digest that a tag has now, to be kept as `--build-arg TF_SERVING_IMAGE=docker.io/tensorflow/serving:2.20.0@sha256:...`.

ARG PYTHON_IMAGE=docker.io/library/python:3.12.11-slim-bookworm
# One of serving/constraints: the network is exported with the TensorFlow that this server is built on.
ARG TF_SERVING_VERSION=2.20.0
ARG TF_SERVING_IMAGE=docker.io/tensorflow/serving:${TF_SERVING_VERSION}


# What the server needs at run time, read from setup.cfg: changes in our code leave this layer alone.
FROM ${PYTHON_IMAGE} AS dependencies
ARG TF_SERVING_VERSION
WORKDIR /src
COPY serving/constraints constraints
RUN test -f "constraints/${TF_SERVING_VERSION}.txt" || { \
    echo "TF_SERVING_VERSION=${TF_SERVING_VERSION} has no file in serving/constraints; there are:" constraints/*.txt >&2; \
    exit 1; }
COPY setup.cfg ./
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_config,target=/etc/pip.conf \
    python3 -c "from configparser import ConfigParser as C; c = C(); c.read('setup.cfg'); \
print(c['options']['install_requires'], c['options.extras_require']['serving'])" > requirements.txt \
    # The pip that fills the environment stands beside it, so that no image gets it.
    && python3 -m venv /opt/tools \
    && python3 -m venv --without-pip /opt/venv \
    && /opt/tools/bin/pip --python /opt/venv/bin/python install --no-compile \
        --requirement requirements.txt --constraint "constraints/${TF_SERVING_VERSION}.txt" \
    # Headers are for compiling against TensorFlow, which nobody does here.
    && rm -rf /opt/venv/lib/python3*/site-packages/tensorflow/include


# Our wheel exports the network, folded, with labels, pictures as bytes, warm-up and drift, and verifies what it wrote.
FROM dependencies AS builder
ARG TF_SERVING_VERSION
COPY pyproject.toml README.md LICENSE ./
COPY keras_bn keras_bn
COPY keras_bn_cli keras_bn_cli
COPY serving/keras_bn_serving serving/keras_bn_serving
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_config,target=/etc/pip.conf \
    /opt/tools/bin/pip wheel --no-deps --wheel-dir /wheels . \
    && /opt/tools/bin/pip --python /opt/venv/bin/python install --no-compile \
        "$(echo /wheels/keras_bn-*.whl)[models]" --constraint "constraints/${TF_SERVING_VERSION}.txt" \
    # What exports is the wheel, not the checkout.
    && rm -rf keras_bn keras_bn_cli serving
COPY models models
RUN TF_CPP_MIN_LOG_LEVEL=2 /opt/venv/bin/python -m models.pretrained export /models/fashion_cnn --version 1


# What trains the network, alone or as one of several workers: models/k8s, docs/scale.md.
FROM ${PYTHON_IMAGE} AS training
LABEL org.opencontainers.image.title="fashion_cnn, training" \
      org.opencontainers.image.description="Trains the reference networks, on one machine or on many" \
      org.opencontainers.image.licenses="Apache-2.0"
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
COPY --from=builder /opt/venv /opt/venv
COPY models /app/models
WORKDIR /app
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
ENTRYPOINT ["/opt/venv/bin/python", "-m", "models.train"]


# The embedded server: the same protocol and flags, on any machine that TensorFlow runs on.
FROM ${PYTHON_IMAGE} AS embedded
LABEL org.opencontainers.image.title="fashion_cnn, embedded server" \
      org.opencontainers.image.description="A trained network behind a server that speaks TensorFlow Serving's protocol" \
      org.opencontainers.image.licenses="Apache-2.0"
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
COPY --from=dependencies /opt/venv /opt/venv
COPY serving/keras_bn_serving /app/keras_bn_serving
COPY serving/model-available /usr/local/bin/
COPY serving/config /config
COPY --from=builder /models /models
WORKDIR /app
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
EXPOSE 8500 8501
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["model-available", "fashion_cnn"]
ENTRYPOINT ["/opt/venv/bin/python", "-m", "keras_bn_serving", "--address=0.0.0.0", "--port=8500", "--rest_api_port=8501", \
    "--model_config_file=/config/models.config", "--model_config_file_poll_wait_seconds=30", \
    "--monitoring_config_file=/config/monitoring.config"]


# TensorFlow Serving itself. It is started without its image's shell script, which would keep SIGTERM to itself.
# TensorFlow Serving has no handler for it, and Linux spares process 1 a signal that it does not handle: to be stopped at
# once and not after the grace period, it is to be run below an init (`docker run --init`, `init: true`,
# `shareProcessNamespace: true`). https://github.com/tensorflow/serving/issues/1853
# That script is also what reads MODEL_NAME and MODEL_BASE_PATH. Here they only say what is served: setting them changes
# nothing. Another model: `--model_config_file= --model_name=NAME --model_base_path=/models/NAME` after the image's name.
FROM ${TF_SERVING_IMAGE} AS serving
ARG TF_SERVING_VERSION
LABEL org.opencontainers.image.title="fashion_cnn, TensorFlow Serving" \
      org.opencontainers.image.description="A trained network behind TensorFlow Serving ${TF_SERVING_VERSION}; \
flags say what is served, MODEL_NAME is not read" \
      org.opencontainers.image.licenses="Apache-2.0"
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
COPY serving/model-available /usr/local/bin/
COPY serving/config /config
COPY --from=builder /models /models
# A server reads older graphs, and refuses operations that are newer than itself: TF_SERVING_IMAGE may be any image, so it
# is asked.
# hadolint ignore=DL4006
RUN exported=$(sed -n 's/.*"tensorflow": "\(.*\)".*/\1/p' /models/fashion_cnn/1/assets.extra/keras_bn.json) \
    && server=$(/usr/bin/tensorflow_model_server --version | sed -n 's/^TensorFlow Library: //p') \
    && test "$(printf '%s\n' "${exported}" "${server}" | sort --version-sort | head -n 1)" = "${exported:-unknown}" || { \
    echo "The network was exported with TensorFlow ${exported:-?}, and the server of TF_SERVING_IMAGE holds ${server:-?}:" \
        "TF_SERVING_VERSION must be the version of TF_SERVING_IMAGE, or an older one" >&2; \
    exit 1; }
# Where oneDNN is on, TensorFlow takes as much memory for tensors as the machine has, whatever the container may have, and
# gives none back: over gRPC a hundred bytes that claim a shape of gigabytes make it do so, and the container is killed.
# Beyond these bytes the answer is an error instead. A larger model or batch: `--env TF_MKL_ALLOC_MAX_BYTES=...`.
ENV MODEL_NAME=fashion_cnn MODEL_BASE_PATH=/models TF_MKL_ALLOC_MAX_BYTES=1073741824
USER 65532:65532
EXPOSE 8500 8501
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["model-available", "fashion_cnn"]
# A request over REST keeps its thread while it waits for its batch: as many threads as a batch has rows.
ENTRYPOINT ["/usr/bin/tensorflow_model_server", "--port=8500", "--rest_api_port=8501", "--rest_api_num_threads=64", \
    "--model_config_file=/config/models.config", "--model_config_file_poll_wait_seconds=30", \
    "--monitoring_config_file=/config/monitoring.config", \
    "--enable_batching=true", "--batching_parameters_file=/config/batching.config"]
