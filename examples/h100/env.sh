# The environment of a run on H100 nodes; the launchers source it. What is set already is kept, so `VAR=value bash ...`
# overrides a line. Not run on a GPU: the reasons are those of the libraries' documentation, docs/clusters.md has them.
# shellcheck shell=bash

# Kernels start in the order they are issued, so that a tensor-parallel collective goes beside the matrix product it was
# put in front of. megatron-core counts on it before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# Micro-batches differ in length: segments that grow leave fewer gaps in device memory than ones of fixed size.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# Threads of a process on the CPU. torchrun would set 1; cores of a node / GPUs of a node is the most that makes sense.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# The tokenizers library is used before worker processes are forked and warns about it.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# Ranks that torchrun starts again on several nodes would find the addresses of the dead ones in its store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}

# NCCL says what goes wrong; INFO shows the networks it chose.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# IFNAME=eth0: the interface that reaches the other nodes, where the libraries do not find it. NCCL meets over it (data go
# over InfiniBand), gloo uses it for checkpoints.
if [ -n "${IFNAME:-}" ]; then
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$IFNAME} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$IFNAME}
fi

# Left to NCCL on purpose: NCCL_IB_HCA (set it where a node has adapters that are not for NCCL, such as for storage),
# NCCL_NVLS_ENABLE (0 to look for a fault in NVLink SHARP or to save its memory).
