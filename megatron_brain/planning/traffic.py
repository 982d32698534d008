"""Memory traffic of what is not a matrix product, counted from the operations of our layers and heads."""

from megatron_brain.config.model import ResolvedModel
from megatron_brain.planning.sizes import layer_parameters, linear_layers, linear_weights
from megatron_brain.planning.workload import Layout, Precision, Workload

# Bytes of traffic of each logit (logprobs.py): it is written in bf16 (2), copied to float32 (6) and read for the
# maximum (4), which is subtracted from it (8); then it is exponentiated (8) and summed (4).
LOGIT_FORWARD_BYTES = 32
# The exponentials become gradients in place (8), are lowered to bf16 (6) and read by two products (4).
LOGIT_GRADIENT_BYTES = 18
# The backward pass computes a block again: product, copy, subtraction, exponential.
LOGIT_AGAIN_BYTES = 24
# An entry of a product is added to a sum in float32; one of low precision is first written and read.
SUM_BYTES = 8
PRODUCT_BYTES = 4
# In the choice of a token (generation/choose.py) each logit is read for the maximum (4), which is subtracted; it is
# scaled and exponentiated in place (24 with that), and summed in blocks (4). What tensor-parallel ranks exchange is a
# hundredth of that.
CHOICE_BYTES = 32
# In vLLM's choice with a seed for each request and --logprobs-mode processed_logprobs (its sampler without top-p and
# top-k) each logit is copied to float32 (6) and divided by the temperature (8). Log-probabilities and probabilities
# read it twice and write it (24). Noise is written (4), divides the probabilities (12), and the largest is found (4).
# The rank of the chosen one reads the log-probabilities again (4).
ENGINE_CHOICE_BYTES = 62
# Each score of a query head in a token round (generation/cache.py) is written (4), joined with the others (8), read and
# written by the softmax (8), and read by the product with the values (4).
SCORE_BYTES = 24

# For each parameter AdamW's update reads the gradient for the norm, clips it and reads it again (4 + 8 + 4), and reads
# and writes weight and two moments in float32 (24).
UPDATE_BYTES = 40
# The gradient buffer, whole on every rank, is set to zero.
GRADIENT_ZERO_BYTES = 4


def bytes_per_value(workload: Workload) -> int:
    """Bytes of an entry of activations, and of the weights that the passes compute with."""
    return 4 if workload.precision == "fp32" else 2


def layer_forward_bytes(workload: Workload, layout: Layout) -> float:
    """Elementwise traffic of one layer on one rank for one token of the micro-batch (`context` left out).

    Two norms read and write the residual stream (4 h), two additions read both terms and write one (6 h), the rotation
    reads and writes queries and keys, the activation reads the output of fc1 and writes the input of fc2. FP8 reads
    each input of a linear map once more and writes it twice, as it is and transposed, with a byte for each entry.
    """
    model, tensor = workload.model, layout.tensor
    qkv, proj, fc1, fc2 = linear_layers(model)
    stream = 10 * model.hidden_size / (tensor if layout.sequence_parallel else 1)
    rotated = 2 * (qkv.outputs - model.num_query_groups * model.kv_channels) / tensor
    activation = (fc1.outputs + fc2.inputs) / tensor
    casts = (2 + 2) * (qkv.inputs + fc1.inputs + (proj.inputs + fc2.inputs) / tensor)
    values = (stream + rotated + activation) * bytes_per_value(workload)
    return values + (casts if workload.precision == "fp8" else 0)


def layer_backward_bytes(workload: Workload, layout: Layout) -> float:
    """As `layer_forward_bytes`, for the backward pass: norms read input and gradient and write one (6 h), gradients are
    added where the residual stream branches (6 h), the activation reads both its inputs and its gradient and writes
    two gradients. FP8 casts the gradients of all outputs."""
    model, tensor = workload.model, layout.tensor
    qkv, proj, fc1, fc2 = linear_layers(model)
    stream = 12 * model.hidden_size / (tensor if layout.sequence_parallel else 1)
    rotated = 2 * (qkv.outputs - model.num_query_groups * model.kv_channels) / tensor
    activation = (2 * fc1.outputs + fc2.inputs) / tensor
    casts = (2 + 2) * ((qkv.outputs + fc1.outputs) / tensor + proj.outputs + fc2.outputs)
    values = (stream + rotated + activation) * bytes_per_value(workload)
    return values + (casts if workload.precision == "fp8" else 0)


def linear_operand_bytes(workload: Workload, layout: Layout, tokens: float, precision: Precision) -> float:
    """Traffic of a layer's linear maps on one rank: reading weights and inputs (FP8: a byte each), writing results."""
    qkv, proj, fc1, fc2 = linear_layers(workload.model)
    size = {"fp32": 4, "bf16": 2, "fp8": 1}[precision]
    inputs = qkv.inputs + fc1.inputs + (proj.inputs + fc2.inputs) / layout.tensor
    outputs = (qkv.outputs + fc1.outputs) / layout.tensor + proj.outputs + fc2.outputs
    weights = linear_weights(workload.model) / layout.tensor
    return size * (weights + tokens * inputs) + bytes_per_value(workload) * tokens * outputs


def gradient_bytes(workload: Workload, layout: Layout) -> float:
    """Traffic of adding one layer's weight gradients of one micro-batch to the float32 buffer: it is read and written
    (8), and without fusion the gradients are first written and read."""
    way = 0 if layout.gradient_accumulation_fusion else 2 * bytes_per_value(workload)
    return layer_parameters(workload.model, layout.tensor) * (8 + way)


def update_bytes(workload: Workload, parameters: float, shard: float) -> float:
    """Traffic of AdamW over `shard` of a rank's `parameters`: the update, and writing the weights to compute with."""
    written = bytes_per_value(workload) if workload.precision != "fp32" else 0
    return parameters * GRADIENT_ZERO_BYTES + shard * (UPDATE_BYTES + written)


def cache_bytes_per_value(workload: Workload) -> int:
    """Traffic of one number of the key/value cache in one token round: bf16 is copied to float32 before its product
    (generation/cache.py), so it is read, written and read."""
    return 4 if workload.precision == "fp32" else 2 + 4 + 4


def key_value_width(model: ResolvedModel, tensor: int) -> float:
    """Numbers in the keys and values of one token in one layer on one rank. Attention heads are never cut, so ranks
    hold copies where there are more ranks than key/value heads."""
    return 2 * model.kv_channels * max(1, model.num_query_groups / tensor)
