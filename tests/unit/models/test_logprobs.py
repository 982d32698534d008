"""Log-probabilities without whole logits against torch's softmax over the whole vocabulary in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_brain.models.logprobs import local_logits, vocab_parallel_logprobs, vocab_parallel_token_scores

POSITIONS, WIDTH, PADDED, VOCAB = 13, 8, 20, 17
CHUNK_SIZES = [1, 7, PADDED, 4 * PADDED + 3, POSITIONS * VOCAB - 1, 10**6]
WAYS = pytest.mark.parametrize("way", ["recomputed", "known gradient"])


@pytest.fixture
def group(single):
    return single.groups.tp


@pytest.fixture
def inputs():
    """hidden `[N, h]`, weight `[V, h]`, targets `[N]` that reach both ends of the vocabulary, weights of the loss."""
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(POSITIONS, WIDTH, generator=generator)
    weight = torch.randn(PADDED, WIDTH, generator=generator)
    targets = torch.randint(VOCAB, (POSITIONS,), generator=generator)
    targets[:2] = torch.tensor([0, VOCAB - 1])
    return hidden, weight, targets, torch.randn(POSITIONS, generator=generator)


def reference(hidden, weight, targets, loss_weights, *, temperature=1.0, vocab_size=VOCAB):
    """Values and gradients of hidden and weight, from whole logits in float64."""
    hidden, weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    logprobs = torch.log_softmax(hidden @ weight[:vocab_size].t() / temperature, 1).gather(1, targets[:, None])[:, 0]
    (logprobs * loss_weights.double()).sum().backward()
    return logprobs.detach(), hidden.grad, weight.grad


def computed(group, hidden, weight, targets, loss_weights, *, way="recomputed", loss_scale=1.0, **options):
    """Values and gradients of hidden and weight of the loss `loss_scale * sum(loss_weights * logprobs)`."""
    hidden, weight = (tensor.clone().requires_grad_() for tensor in (hidden, weight))
    options = {"vocab_size": VOCAB, "known_gradient": loss_weights if way == "known gradient" else None} | options
    logprobs = vocab_parallel_logprobs(hidden, weight, targets, group=group, **options)
    (loss_scale * (logprobs * loss_weights).sum()).backward()
    return logprobs.detach(), hidden.grad, weight.grad


def expect_close(actual, expected, **tolerances):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), **tolerances)


class Recorder(TorchDispatchMode):
    """Counts matrix products and notes the largest tensor that was allocated, in entries."""

    def __init__(self, *known):
        super().__init__()
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.seen:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@WAYS
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("vocab_size", [VOCAB, PADDED])
def test_values_and_gradients_are_those_of_log_softmax(group, inputs, way, temperature, vocab_size):
    options = {"temperature": temperature, "vocab_size": vocab_size}
    actual = computed(group, *inputs, way=way, **options)
    assert actual[0].dtype == torch.float32
    expect_close(actual, reference(*inputs, **options), rtol=1e-5, atol=1e-5)


@WAYS
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_chunk_size_changes_nothing(group, inputs, way, chunk_size):
    doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    actual = computed(group, *doubles, way=way, chunk_size=chunk_size, temperature=0.7)
    assert actual[0].dtype == torch.float64
    expect_close(actual, reference(*inputs, temperature=0.7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_gradients_are_finite_differences(group, inputs, chunk_size):
    hidden, weight, targets, _ = inputs

    def logprobs(hidden, weight):
        options = {"group": group, "vocab_size": VOCAB, "temperature": 0.7, "chunk_size": chunk_size}
        return vocab_parallel_logprobs(hidden, weight, targets, **options)

    assert torch.autograd.gradcheck(logprobs, (hidden.double().requires_grad_(), weight.double().requires_grad_()))


@WAYS
def test_vocabulary_padding_has_no_probability_and_no_gradient(group, inputs, way):
    hidden, weight, targets, loss_weights = inputs
    expected = computed(group, *inputs, way=way)
    weight = weight.clone()
    weight[VOCAB:] = 1e3
    actual = computed(group, hidden, weight, targets, loss_weights, way=way)
    expect_close(actual, expected, rtol=0, atol=0)
    assert not actual[2][VOCAB:].any()
    everything = vocab_parallel_logprobs(
        hidden[:1].expand(VOCAB, -1), weight, torch.arange(VOCAB), group=group, vocab_size=VOCAB
    )
    assert everything.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("target", [-100, VOCAB, PADDED, 10**6])
def test_a_target_outside_the_vocabulary_has_probability_zero(group, inputs, target):
    hidden, weight, targets, _ = inputs
    targets[3] = target
    scores = vocab_parallel_token_scores(hidden, weight, targets, group=group, vocab_size=VOCAB)
    assert scores.logprobs[3] == -torch.inf and not scores.is_top1[3]
    assert scores.logprobs.isfinite().sum() == POSITIONS - 1


def test_logits_of_one_share_are_its_rows_with_padding_at_minus_infinity(inputs):
    hidden, weight, *_ = inputs
    whole = local_logits(hidden, weight, first_id=0, vocab_size=VOCAB, temperature=0.5)
    halves = [
        local_logits(hidden, weight[start : start + 10], first_id=start, vocab_size=VOCAB, temperature=0.5)
        for start in (0, 10)
    ]
    torch.testing.assert_close(torch.cat(halves, 1), whole)
    assert whole[:, :VOCAB].isfinite().all() and (whole[:, VOCAB:] == -torch.inf).all()
    past_the_end = local_logits(hidden, weight, first_id=VOCAB + 3, vocab_size=VOCAB)
    assert (past_the_end == -torch.inf).all()


@WAYS
@pytest.mark.parametrize("chunk_size", [7, 10**6])
def test_inputs_are_not_modified(group, inputs, way, chunk_size):
    hidden, weight, targets, loss_weights = inputs
    before = [tensor.clone() for tensor in inputs]
    hidden.requires_grad_()
    weight.requires_grad_()
    known = loss_weights if way == "known gradient" else None
    options = {"group": group, "vocab_size": VOCAB, "temperature": 0.5, "chunk_size": chunk_size}
    scores = vocab_parallel_token_scores(hidden, weight, targets, **options, known_gradient=known)
    scores.logprobs.backward(loss_weights)
    assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True))


@pytest.mark.parametrize("chunk_size", [7, 10**6])
def test_backward_may_run_twice(group, inputs, chunk_size):
    hidden, weight, targets, loss_weights = inputs
    hidden.requires_grad_()
    logprobs = vocab_parallel_logprobs(hidden, weight, targets, group=group, vocab_size=VOCAB, chunk_size=chunk_size)
    loss = (logprobs * loss_weights).sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], first)


@WAYS
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_the_other_its_own(group, inputs, way, frozen):
    expected = computed(group, *inputs)[1 + (1 - frozen)]
    tensors = [inputs[0].clone(), inputs[1].clone()]
    tensors[1 - frozen].requires_grad_()
    known = inputs[3] if way == "known gradient" else None
    with Recorder() as recorder:
        logprobs = vocab_parallel_logprobs(*tensors, inputs[2], group=group, vocab_size=VOCAB, known_gradient=known)
        (logprobs * inputs[3]).sum().backward()
    assert tensors[frozen].grad is None
    torch.testing.assert_close(tensors[1 - frozen].grad, expected)
    assert recorder.products == 2, "logits and one gradient"


@WAYS
@pytest.mark.parametrize("chunk_size", [1, 37, 10**6])
def test_bfloat16_inputs_give_float32_values_and_bfloat16_gradients(group, inputs, way, chunk_size):
    hidden, weight, targets, loss_weights = inputs
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    actual = computed(group, hidden, weight, targets, loss_weights, way=way, chunk_size=chunk_size)
    assert [tensor.dtype for tensor in actual] == [torch.float32, torch.bfloat16, torch.bfloat16]
    expect_close(actual, reference(hidden, weight, targets, loss_weights), rtol=0.03, atol=0.06)


@WAYS
def test_bfloat16_gradients_of_many_positions_are_summed_in_float32(group, way):
    """512 equal contributions of 1/512: sums in bfloat16 would stick where one more is less than half a unit."""
    positions = 512
    hidden, weight = torch.ones(positions, 1).bfloat16(), torch.zeros(2, 1).bfloat16()
    loss_weights = torch.full((positions,), 2.0 / positions)
    targets = torch.zeros(positions, dtype=torch.long)
    grad_weight = computed(group, hidden, weight, targets, loss_weights, way=way, vocab_size=2, chunk_size=2)[2]
    assert grad_weight.flatten().tolist() == [1.0, -1.0]


@WAYS
@pytest.mark.parametrize("chunk_size", [1, 10**6])
def test_large_logits_do_not_overflow(group, way, chunk_size):
    hidden = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    ones = torch.ones(3)
    scores = vocab_parallel_token_scores(
        hidden, weight, torch.tensor([0, 0, 0]), group=group, vocab_size=3, chunk_size=chunk_size,
        known_gradient=ones if way == "known gradient" else None,
    )  # fmt: skip
    scores.logprobs.backward(ones)
    log_3 = torch.tensor(3.0).log().item()
    assert scores.logprobs.tolist() == pytest.approx([0.0, -2e4, -log_3])
    assert scores.entropy.tolist() == pytest.approx([0.0, 0.0, log_3], abs=1e-6)
    assert scores.is_top1.tolist() == [True, False, True]
    # Position 1 is certain of id 1: (1[target] - p) @ weight = 1 + 1; position 2 has equal weights: 1 - 0.
    assert hidden.grad.flatten().tolist() == pytest.approx([0.0, 2.0, 1.0])
    assert weight.grad.flatten().tolist() == pytest.approx([-1e4, 1e4, 0.0])


@WAYS
def test_no_positions_give_no_values_and_zero_gradients(group, inputs, way):
    hidden, weight, targets, loss_weights = inputs
    nothing = (hidden[:0], weight, targets[:0], loss_weights[:0])
    logprobs, grad_hidden, grad_weight = computed(group, *nothing, way=way)
    assert logprobs.shape == (0,) and grad_hidden.shape == (0, WIDTH) and not grad_weight.any()
    scores = vocab_parallel_token_scores(
        hidden[:0].requires_grad_(), weight, targets[:0], group=group, vocab_size=VOCAB
    )
    assert scores.logprobs.requires_grad and [len(part) for part in scores] == [0, 0, 0]


@WAYS
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_scores_have_the_entropy_and_the_likeliest_token_of_the_softmax(
    group, inputs, way, chunk_size, temperature
):
    hidden, weight, targets, loss_weights = inputs
    logits = hidden.double() @ weight[:VOCAB].double().t() / temperature
    targets[::2] = logits.argmax(1)[::2]
    expected = reference(*inputs, temperature=temperature)
    hidden.requires_grad_()
    scores = vocab_parallel_token_scores(
        hidden, weight, targets, group=group, vocab_size=VOCAB, temperature=temperature, chunk_size=chunk_size,
        known_gradient=loss_weights if way == "known gradient" else None,
    )  # fmt: skip
    assert [part.dtype for part in scores] == [torch.float32, torch.float32, torch.bool]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(scores.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores.is_top1, logits.argmax(1) == targets)
    assert scores.logprobs.requires_grad and not scores.entropy.requires_grad
    scores.logprobs.backward(loss_weights)
    expect_close((scores.logprobs.detach(), hidden.grad), expected[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 10**6])
def test_every_one_of_the_likeliest_tokens_is_a_top1(group, inputs, chunk_size):
    hidden, weight = inputs[0][:1].expand(3, -1), inputs[1].clone()
    weight[3] = weight[11] = hidden[0]  # the largest logits by far
    options = {"group": group, "vocab_size": VOCAB, "chunk_size": chunk_size}
    assert vocab_parallel_token_scores(hidden, weight, torch.tensor([3, 11, 5]), **options).is_top1.tolist() == [
        True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0, -0.3, 0.0])
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_known_gradient_gives_what_recomputing_gives(group, inputs, loss_scale, chunk_size, dtype, tolerance):
    inputs = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs]
    options = {"chunk_size": chunk_size, "temperature": 0.7, "loss_scale": loss_scale}
    actual, expected = (computed(group, *inputs, way=way, **options) for way in ("known gradient", "recomputed"))
    for one, other in zip(actual, expected, strict=True):
        largest = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * largest)


def known_logprobs(group, inputs, known):
    hidden, weight, targets, _ = inputs
    hidden.requires_grad_()
    return vocab_parallel_logprobs(hidden, weight, targets, group=group, vocab_size=VOCAB, known_gradient=known)


def test_a_broken_promise_is_refused_with_its_numbers(group, inputs):
    known = inputs[3]
    broken = 2.0 * known
    broken[4] *= 1.001
    with pytest.raises(RuntimeError, match=r"no multiple of known_gradient: norm \d.*, nearest multiple 2.00"):
        known_logprobs(group, inputs, known).backward(broken)
    with pytest.raises(RuntimeError, match="no multiple of known_gradient"):
        known_logprobs(group, inputs, torch.zeros_like(known)).backward(known)
    assert inputs[0].grad is None


@pytest.mark.parametrize(("known_scale", "scale"), [(0.0, 0.0), (1.0, 0.0), (1e-30, 1e30), (1.0, 1 / 3)])
def test_a_promise_holds_at_any_scale_and_for_zeros(group, inputs, known_scale, scale):
    known = inputs[3] * known_scale
    gradient = known * scale
    expected = reference(*inputs[:3], gradient)[1]
    known_logprobs(group, inputs, known).backward(gradient)
    torch.testing.assert_close(inputs[0].grad.double(), expected, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


def test_a_gradient_that_is_not_finite_arrives_as_such(group, inputs):
    """The trainer stops at it and names the records, which a broken promise could not."""
    known = inputs[3]
    known_logprobs(group, inputs, known).backward(torch.where(known == known[5], torch.nan, known))
    assert inputs[0].grad.isnan().all()


def test_gradients_computed_beforehand_are_handed_out_once(group, inputs):
    logprobs = known_logprobs(group, inputs, inputs[3])
    logprobs.backward(inputs[3], retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward"):
        logprobs.backward(inputs[3])


def test_without_gradients_to_compute_a_known_gradient_costs_nothing(group, inputs):
    hidden, weight, targets, known = inputs
    options = {"group": group, "vocab_size": VOCAB, "known_gradient": known}
    with Recorder() as recorder:
        frozen = vocab_parallel_logprobs(hidden, weight, targets, **options)
    assert recorder.products == 1 and not frozen.requires_grad
    hidden.requires_grad_()
    with torch.no_grad(), Recorder() as recorder:
        assert torch.equal(vocab_parallel_logprobs(hidden, weight, targets, **options), frozen)
    assert recorder.products == 1


@WAYS
def test_what_fits_one_chunk_takes_three_matrix_products(group, inputs, way):
    with Recorder() as recorder:
        computed(group, *inputs, way=way)
    assert recorder.products == 3


def test_recomputing_takes_four_matrix_products_per_block(group, inputs):
    with Recorder() as recorder:
        computed(group, *inputs, chunk_size=len(inputs[2]) * VOCAB - 1)
    assert recorder.products == 4 * 2


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_the_chunk_and_the_gradients(group, way, dtype):
    positions, width, vocab, chunk_size = 256, 2, 1024, 4096
    hidden = torch.randn(positions, width, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, dtype=dtype).requires_grad_()
    loss_weights = torch.randn(positions)
    with Recorder(hidden, weight) as recorder:
        scores = vocab_parallel_token_scores(
            hidden, weight, torch.randint(vocab, (positions,)), group=group, vocab_size=vocab, temperature=0.7,
            chunk_size=chunk_size, known_gradient=loss_weights if way == "known gradient" else None,
        )  # fmt: skip
        scores.logprobs.backward(loss_weights)
    assert vocab * width < chunk_size == positions * vocab // 64
    assert recorder.largest == chunk_size


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"known_gradient": torch.ones(1)}, r"known_gradient has shape \[1\], targets have \[13\]"),
    ],
)
def test_settings_that_cannot_be_are_refused(group, inputs, option, message):
    with pytest.raises(AssertionError, match=message):
        vocab_parallel_logprobs(*inputs[:3], group=group, vocab_size=VOCAB, **option)
