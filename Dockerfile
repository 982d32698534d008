# megatron_brain on NVIDIA's PyTorch image, whose PyTorch and Transformer Engine are built for each other.
# Never built by us: what was tested of it, and how to run it, is in docs/docker.md.
#
#   docker build --tag megatron_brain .

# Each tag that may stand here has its megatron-core in tools/install.py.
ARG NGC_TAG=26.06-py3
FROM nvcr.io/nvidia/pytorch:${NGC_TAG}

# The image has pip refuse every other version of all that it brings. tools/install.py keeps what is compiled.
ENV PIP_CONSTRAINT=

# What decides the dependencies comes before the sources: a change of these alone installs nothing again.
WORKDIR /opt/megatron_brain
COPY setup.py pyproject.toml README.md constraints-cpu-3.12.txt ./
COPY tools/install.py tools/
COPY megatron_brain/__init__.py megatron_brain/
ARG NGC_TAG
RUN PIP_NO_CACHE_DIR=1 python tools/install.py --constraints constraints-cpu-3.12.txt --ngc-image "${NGC_TAG}"

COPY . .
# Every module can be imported with these versions; that takes no GPU.
RUN python tools/check_imports.py

# Runs write to runs/ and read data/ and models/ here, or whatever is mounted there.
ARG USER_ID=10001
RUN useradd --no-log-init --create-home --uid "${USER_ID}" brain \
    && install --directory --owner "${USER_ID}" data models runs
USER ${USER_ID}

ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron_brain" \
      org.opencontainers.image.description="Post-training of megatron-core GPT models: SFT, reward models and BRAIn" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="nvcr.io/nvidia/pytorch:${NGC_TAG}"

# The image's entry point stays: it looks at the driver and then runs the command.
CMD ["python", "-m", "megatron_brain", "--help"]
