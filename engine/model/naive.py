"""The models written down plainly: what the served ones are compared with.

No caches, no pages, no kernels: every pass starts from the token ids. Letters in shapes: B sequences, N blocks, L
block length, T positions, H block decoder width, h token decoder width, R expanded vectors, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.config import BlockTransformerConfig, ModelConfig, PromptAlignment, VanillaConfig
from engine.model.naive_layers import NaiveDecoder
from engine.types import FinishReason, SamplingParams
from kernels.sampler import SamplingTables, perturbed_scores


class NaiveForward(NamedTuple):
    """What teacher forcing computes; `logits[b, i, j]` predicts token j of block i + 1."""

    block_embeddings: Tensor
    """[B, N, H]."""
    context_embeddings: Tensor
    """[B, N, H]; entry i conditions block i + 1."""
    logits: Tensor
    """[B, N - 1, L, V]."""


class NaiveAnswer(NamedTuple):
    """An answer and how clear each choice was."""

    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | None
    margins: list[float]
    """For each token: its score minus the second best, noise included."""
    logprobs: list[list[float]]
    """Where they were asked for: for each token the whole vocabulary's [V], before bias and penalties."""


class NaiveModel(ABC):
    """A model over a checkpoint's tensors, which keep their names and shapes.

    Blocks are embedded, the block decoder makes a context embedding of each, and a block is written from the context
    embedding in front of it. Kinds of models differ in how they embed and write. Computes on `device`.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        decoder: str,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """`decoder`: the name of the block decoder in the checkpoint."""
        self.config = config
        self.device = torch.device(device)
        self._tensors = {name: tensor.to(self.device, dtype) for name, tensor in tensors.items()}
        self._block_decoder = NaiveDecoder(config.block_decoder, self._tensors, decoder)

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Block embeddings: ids [B, N, L] -> [B, N, H]."""

    @abstractmethod
    def block_logits(self, contexts: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits for each token of a block, given the tokens before it and the block's context.

        contexts [B, H], tokens [B, L] (what stands at j matters only behind j), mask [B, L] bool -> [B, L, V].
        """

    def contexts(self, embeddings: Tensor, block_mask: Tensor | None = None) -> Tensor:
        """Context embeddings: block embeddings [B, N, H] and block_mask [B, N] bool -> [B, N, H]."""
        return self._block_decoder.forward(embeddings, block_mask)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> NaiveForward:
        """Predict every block of ids [B, N, L] but the first from those before it and from its own tokens.

        mask [B, N, L]: 0 where a token is padding. A block of nothing but padding is no key of the block decoder, and a
        padding token no key of the token decoder.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        embeddings = self.embed(ids)
        contexts = self.contexts(embeddings, mask.bool().any(-1))
        sequences, blocks, length = ids.shape
        logits = self.block_logits(
            contexts[:, :-1].flatten(0, 1), ids[:, 1:].flatten(0, 1), mask[:, 1:].bool().flatten(0, 1)
        )
        return NaiveForward(embeddings, contexts, logits.view(sequences, blocks - 1, length, -1))

    def generate(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, alignment: PromptAlignment | None = None
    ) -> NaiveAnswer:
        """Answer one prompt as the engine has to; stop strings play no part. `alignment` stands in for the config's."""
        blocks, forced = self._align(prompt_token_ids, alignment or self.config.prompt_alignment)
        tables = self._sampling_tables(params)
        tokens: list[int] = []
        margins: list[float] = []
        logprobs: list[list[float]] = []
        while True:
            context = self.contexts(self.embed(self._int64([blocks])))[:, -1]
            block = list(forced)
            while len(block) < self.config.block_length:
                filled = block + [0] * (self.config.block_length - len(block))
                logits = self.block_logits(context, self._int64([filled]))[:, len(block)]
                row, place = self._int64([0]).int(), self._int64([len(tokens)]).int()
                if params.logprobs is not None:
                    logprobs.append(logits[0].float().log_softmax(-1).tolist())
                adjusted = self._adjust(logits[0].float(), prompt_token_ids, tokens, params)
                scores = perturbed_scores(adjusted[None], row, place, tables)[0]
                best, second = scores.topk(2).values.tolist()
                tokens.append(int(scores.argmax()))
                margins.append(best - second if math.isfinite(second) else math.inf)
                reason = self._finish_reason(tokens, params)
                if reason is not None:
                    is_eos = tokens[-1] == self.config.eos_token_id and not params.ignore_eos
                    stop_reason = None if reason == "length" or is_eos else tokens[-1]
                    return NaiveAnswer(tokens, reason, stop_reason, margins, logprobs)
                block.append(tokens[-1])
            blocks, forced = [*blocks, block], []

    def generate_batch(
        self, ids: Tensor, mask: Tensor | None, max_length: int, *, stop_at_eos: bool
    ) -> list[list[int]]:
        """Greedy answers for a batch of prompts ids [B, T], padded on the left where mask [B, T] is 0.

        max_length counts T and the answer. Returns each row's new tokens; with stop_at_eos up to and with end-of-text.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        padding = -ids.shape[1] % self.config.block_length
        ids = torch.nn.functional.pad(ids, (padding, 0), value=self.config.pad_token_id)
        mask = torch.nn.functional.pad(mask, (padding, 0), value=0)
        blocks = ids.view(len(ids), -1, self.config.block_length)
        block_mask = mask.view(blocks.shape).bool().any(-1)
        prompt_blocks, wanted = blocks.shape[1], max_length - ids.shape[1] + padding
        while (blocks.shape[1] - prompt_blocks) * self.config.block_length < wanted:
            context = self.contexts(self.embed(blocks), block_mask)[:, -1]
            block = torch.zeros_like(blocks[:, 0])
            for place in range(self.config.block_length):
                block[:, place] = self.block_logits(context, block)[:, place].argmax(-1)
            blocks = torch.cat((blocks, block[:, None]), dim=1)
            block_mask = torch.nn.functional.pad(block_mask, (0, 1), value=True)
        answers: list[list[int]] = blocks[:, prompt_blocks:].flatten(1)[:, :wanted].tolist()
        return [self._cut_at_eos(answer) for answer in answers] if stop_at_eos else answers

    def _align(self, prompt: Sequence[int], alignment: PromptAlignment) -> tuple[list[list[int]], list[int]]:
        """The prompt's blocks, and the tokens that are forced on the block behind them."""
        length = self.config.block_length
        rest = len(prompt) % length
        forced: list[int] = []
        tokens = list(prompt)
        if rest and (alignment == "left_pad" or len(prompt) < length):
            tokens = [self.config.pad_token_id] * (length - rest) + tokens
        elif rest:
            tokens, forced = tokens[:-rest], tokens[-rest:]
        return [tokens[start : start + length] for start in range(0, len(tokens), length)], forced

    def _adjust(self, logits: Tensor, prompt: Sequence[int], answer: Sequence[int], params: SamplingParams) -> Tensor:
        """Bias, then penalties: logits [V], which stay as they are, to be chosen from behind `prompt` and `answer`."""
        adjusted = logits.clone()
        for token, bias in params.logit_bias:
            adjusted[token] += bias
        if params.repetition_penalty != 1:
            seen, factor = sorted({*prompt, *answer}), params.repetition_penalty
            before = adjusted[seen]
            adjusted[seen] = torch.where(before > 0, before / factor, before * factor)
        if params.presence_penalty or params.frequency_penalty:
            for token, count in Counter(answer).items():
                adjusted[token] -= params.presence_penalty + count * params.frequency_penalty
        return adjusted

    def _finish_reason(self, tokens: list[int], params: SamplingParams) -> FinishReason | None:
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {self.config.eos_token_id})
        if tokens[-1] in stops and len(tokens) > params.min_tokens:
            return "stop"
        return "length" if len(tokens) == params.max_tokens else None

    def _sampling_tables(self, params: SamplingParams) -> SamplingTables:
        """Tables of one row. Raises ValueError where a sampled request has no seed."""
        if params.temperature > 0 and params.seed is None:
            raise ValueError("a sampled answer can only be repeated with a seed")
        suppressed = [*params.stop_token_ids, *([] if params.ignore_eos else [self.config.eos_token_id])]
        return SamplingTables(
            temperature=self._float32([params.temperature]),
            top_k=self._int64([params.top_k]).int(),
            top_p=self._float32([params.top_p]),
            min_p=self._float32([params.min_p]),
            seed=self._int64([params.seed or 0]),
            suppress_until=self._int64([params.min_tokens]).int(),
            suppressed_ids=self._int64([suppressed]).int().view(1, -1),
        )

    def _int64(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _float32(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def _cut_at_eos(self, tokens: list[int]) -> list[int]:
        eos = self.config.eos_token_id
        return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


class NaiveBlockTransformer(NaiveModel):
    """The Block Transformer (Ho et al., 2024, arXiv 2406.02657)."""

    config: BlockTransformerConfig

    def __init__(
        self,
        config: BlockTransformerConfig,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(config, tensors, "block_decoder.gpt_neox", dtype, device)
        self._token_decoder = NaiveDecoder(config.token_decoder, self._tensors, "token_decoder.gpt_neox")

    def embed(self, ids: Tensor) -> Tensor:
        """Block embeddings: ids [B, N, L] -> [B, N, H]."""
        vectors = self._tensors["embedder.embeddings.weight"][ids.long()]  # [B, N, L, E]
        if self.config.embedder.projection == "concat":
            return vectors.flatten(2)
        weight = self._tensors["embedder.projection_layer.weight"]  # [H, E, L]
        return torch.einsum("bnle,hel->bnh", vectors, weight) + self._tensors["embedder.projection_layer.bias"]

    def expand(self, contexts: Tensor) -> Tensor:
        """Context embeddings [B, H] -> [B, R, h]."""
        weight = self._tensors["token_decoder.expansion_layer.weight"].squeeze(-1)
        expanded = contexts @ weight.T + self._tensors["token_decoder.expansion_layer.bias"]
        return expanded.view(len(contexts), self.config.expanded_vectors, -1)

    def block_logits(self, contexts: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits for each token of a block, given the tokens before it and the block's context.

        contexts [B, H], tokens [B, L] (what stands at j matters only behind j), mask [B, L] bool -> [B, L, V].
        """
        table = self._tensors["token_decoder.gpt_neox.embed_in.weight"]
        expanded, before = self.expand(contexts), tokens[:, :-1].long()
        seen = torch.ones_like(before, dtype=torch.bool) if mask is None else mask[:, :-1]
        if self.config.token_decoder.strategy == "prefix":
            inputs = torch.cat((expanded, table[before]), dim=1)
            first = expanded.shape[1] - 1
        else:
            start = torch.full_like(tokens[:, :1].long(), self.config.eos_token_id)
            inputs = expanded + table[torch.cat((start, before), dim=1)]
            first = 0
        always = seen.new_ones(len(seen), inputs.shape[1] - seen.shape[1])
        keys_seen = torch.cat((always, seen), dim=1)
        hidden = self._token_decoder.forward(inputs, keys_seen)
        return hidden[:, first:] @ self._tensors["token_decoder.embed_out.weight"].T


class NaiveVanillaTransformer(NaiveModel):
    """A GPT-NeoX transformer: blocks of one token, each read off the layers' output at the token before it."""

    def __init__(
        self,
        config: VanillaConfig,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(config, tensors, "gpt_neox", dtype, device)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings: ids [B, T, 1] -> [B, T, H]."""
        return self._tensors["gpt_neox.embed_in.weight"][ids.squeeze(-1).long()]

    def block_logits(self, contexts: Tensor, _tokens: Tensor, _mask: Tensor | None = None) -> Tensor:
        """Logits of the next token: contexts [B, H] -> [B, 1, V]. No token of its block comes before it."""
        return (contexts @ self._tensors["embed_out.weight"].T)[:, None]


def naive_model(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> NaiveModel:
    """The naive model of the config's kind."""
    if isinstance(config, BlockTransformerConfig):
        return NaiveBlockTransformer(config, tensors, dtype, device)
    assert isinstance(config, VanillaConfig)
    return NaiveVanillaTransformer(config, tensors, dtype, device)
