# The environment of a run on H100 nodes; the launchers source it. `VAR=value bash ...` overrides a line. Not tested on
# a GPU yet: the values follow the libraries' documentation, and docs/clusters.md has the reasons.
# shellcheck shell=bash

# With one connection, kernels start in the order in which they are issued. So a tensor-parallel collective runs beside
# the matrix product that is issued after it. megatron-core needs this on GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# Micro-batches differ in length. Growing memory segments leave fewer gaps in device memory than those of fixed size.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# CPU threads of a process. torchrun would set 1. More than (cores of a node / GPUs of a node) makes no sense.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# The tokenizers library is used before worker processes are forked. Without this setting it warns about that.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# Without this, ranks that torchrun restarts on several nodes would find the addresses of dead ranks in its store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}

# NCCL reports what goes wrong. INFO also shows the networks that it chose.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# IFNAME=eth0 names the interface to the other nodes, where the libraries do not find it. NCCL sets up its connections
# over it (data go over InfiniBand), and gloo uses it for checkpoints.
if [ -n "${IFNAME:-}" ]; then
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$IFNAME} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$IFNAME}
fi

# NCCL chooses these itself: NCCL_IB_HCA (set it where a node has adapters that NCCL must not use, such as for storage),
# NCCL_NVLS_ENABLE (set 0 to look for a fault in NVLink SHARP, or to save its memory).
