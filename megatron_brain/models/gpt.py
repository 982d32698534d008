"""Policy and reward model: a megatron-core GPT trunk that reads packed batches."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_brain.config.model import ResolvedModel
from megatron_brain.data.groups import Group, PackedBatch
from megatron_brain.errors import RecordError
from megatron_brain.models.attention import PackedLayout
from megatron_brain.models.logprobs import vocab_parallel_logprobs, vocab_parallel_token_scores
from megatron_brain.models.rotary import Rotated, scale_frequencies


class _PackedGPT(GPTModel):
    """GPTModel whose trunk is called with explicit positions and an attention layout.

    GPTModel derives rotary positions from the sequence length and builds logits. But a packed sequence with shared
    prefixes needs a position for each token, and log-probabilities need no logits. So the forward pass is ours;
    everything else (construction, pipeline input, checkpoint names) is megatron-core's.
    """

    def __init__(self, *, model: ResolvedModel, packed_multiple: int, device: torch.device, **trunk: Any) -> None:
        """Build the chunk.

        Args:
            model: architecture with every size resolved.
            packed_multiple: the lengths of micro-batches are multiples of this number of tokens.
            device: device of the rotary frequencies, which are not parameters.
            trunk: arguments of GPTModel.
        """
        super().__init__(**trunk)
        self.true_vocab_size, self.logprob_chunk_size = model.vocab_size, model.logprob_chunk_size
        self.longest_sequence, self.packed_multiple = model.longest_sequence, packed_multiple
        if self.position_embedding_type == "rope":
            self.rotary_pos_emb.inv_freq = scale_frequencies(self.rotary_pos_emb.inv_freq, model).to(device)
        elif self.pre_process:
            # megatron-core always makes this one weight in float32, whatever params_dtype says.
            self.embedding.position_embeddings.to(self.config.params_dtype)

    def trunk(self, tokens: Tensor, position_ids: Tensor, layout: PackedSeqParams) -> Tensor:
        """This chunk's hidden states `[T, 1, h]` (`[T/tp, 1, h]` with SP), from tokens and position_ids `[1, T]`."""
        embedded = self.embedding(input_ids=tokens, position_ids=position_ids) if self.pre_process else None
        if self.position_embedding_type == "rope":
            layout = Rotated.by_positions(
                layout,
                position_ids[0],
                self.rotary_pos_emb.inv_freq,
                self.config.kv_channels,
                dtype=self.config.params_dtype,
            )
        return self.decoder(hidden_states=embedded, attention_mask=None, packed_seq_params=layout)

    def _check_lengths(self, groups: Sequence[Group]) -> None:
        """Raise unless the model has a position for every token: a device's own error would not explain it."""
        limit, setting = self.longest_sequence
        for group in groups:
            length = len(group.prompt) + max(map(len, group.responses))
            if length > limit:
                raise RecordError(
                    group.record_id, "too long", f"prompt and response of {length} tokens are more than {setting}"
                )

    def forward(self, batch: PackedBatch) -> Tensor:
        """This chunk's output: its hidden states, or in the last chunk of the model what the head makes of them.

        Raises:
            RecordError: a prompt with its response is longer than the model's positions or its attention's window.
        """
        self._check_lengths(batch.groups)
        hidden = self.trunk(batch.tokens, batch.position_ids, PackedLayout(segments=batch.segments))
        return self.head(hidden, batch) if self.post_process else hidden


class PolicyModel(_PackedGPT):
    """Language model that gives the log-probabilities of response tokens."""

    def head(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Log-probabilities `[N]` float32 of the batch's response tokens. If the batch asks for `token_scores`: the
        fields of `TokenScores` as the rows of one tensor `[3, N]` float32."""
        selected = self.select(hidden, batch.predict_index)
        options = {"temperature": batch.temperature, "known_gradient": batch.known_gradient}
        if not batch.token_scores:
            return self.token_logprobs(selected, batch.targets, **options)
        scores = vocab_parallel_token_scores(selected, self.output_weight, batch.targets, **self._softmax, **options)
        return torch.stack([row.float() for row in scores])

    def select(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Hidden states `[N, h]` at places of the whole sequence. Tensor-parallel ranks sum their gradients."""
        tp = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tp)
            return hidden[:, 0][index]
        return copy_to_tensor_model_parallel_region(hidden[:, 0][index], group=tp)

    @property
    def output_weight(self) -> Tensor:
        """This rank's rows `[V_local, h]` of the output layer."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def token_logprobs(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0, known_gradient: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities `[N]` float32 of `targets` `[N]` given hidden states `[N, h]`; the options are those of
        `vocab_parallel_logprobs`."""
        return vocab_parallel_logprobs(
            hidden,
            self.output_weight,
            targets,
            temperature=temperature,
            known_gradient=known_gradient,
            **self._softmax,
        )

    @property
    def _softmax(self) -> dict:
        """What the functions of logprobs.py must know of this model."""
        return {
            "group": self.pg_collection.tp,
            "vocab_size": self.true_vocab_size,
            "chunk_size": self.logprob_chunk_size,
        }


class RewardModel(_PackedGPT):
    """The same trunk with a scalar head instead of the vocabulary projection."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self.post_process:
            # GPTModel allocates a vocabulary projection, which a reward model does not have.
            self.output_layer = None
            self.reward_head = torch.nn.Linear(self.config.hidden_size, 1, bias=False, dtype=self.config.params_dtype)

    def head(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Rewards `[R]` float32, read at each response's last token."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        # The product is in float32 in bf16 runs too: rounding must not make the rewards of similar responses equal.
        return F.linear(hidden[:, 0][batch.last_index].float(), self.reward_head.weight.float()).squeeze(-1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Sharded tensors of the trunk and the head; GPTModel's own version expects a vocabulary projection."""
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
