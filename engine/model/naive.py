"""The Block Transformer written down plainly: what the served model is compared with.

No caches, no pages, no kernels: every pass starts from the token ids. Letters in shapes: B sequences, N blocks, L
block length, T positions, H block decoder width, h token decoder width, R expanded vectors, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.config import DecoderConfig, ModelConfig, PromptAlignment
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


class NaiveBlockTransformer:
    """The model over a checkpoint's tensors, which keep their names and shapes. Computes on `device`."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self._tensors = {name: tensor.to(self.device, dtype) for name, tensor in tensors.items()}

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

    def embed(self, ids: Tensor) -> Tensor:
        """Block embeddings: ids [B, N, L] -> [B, N, H]."""
        vectors = self._tensors["embedder.embeddings.weight"][ids.long()]  # [B, N, L, E]
        if self.config.embedder.projection == "concat":
            return vectors.flatten(2)
        weight = self._tensors["embedder.projection_layer.weight"]  # [H, E, L]
        return torch.einsum("bnle,hel->bnh", vectors, weight) + self._tensors["embedder.projection_layer.bias"]

    def contexts(self, embeddings: Tensor, block_mask: Tensor | None = None) -> Tensor:
        """Context embeddings: block embeddings [B, N, H] and block_mask [B, N] bool -> [B, N, H]."""
        return self._decoder("block_decoder.gpt_neox", self.config.block_decoder, embeddings, block_mask)

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
        hidden = self._decoder("token_decoder.gpt_neox", self.config.token_decoder, inputs, keys_seen)
        return hidden[:, first:] @ self._tensors["token_decoder.embed_out.weight"].T

    def generate(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, alignment: PromptAlignment | None = None
    ) -> NaiveAnswer:
        """Answer one prompt as the engine has to; stop strings play no part. `alignment` stands in for the config's."""
        blocks, forced = self._align(prompt_token_ids, alignment or self.config.prompt_alignment)
        tables = self._sampling_tables(params)
        tokens: list[int] = []
        margins: list[float] = []
        while True:
            context = self.contexts(self.embed(self._int64([blocks])))[:, -1]
            block = list(forced)
            while len(block) < self.config.block_length:
                filled = block + [0] * (self.config.block_length - len(block))
                logits = self.block_logits(context, self._int64([filled]))[:, len(block)]
                row, place = self._int64([0]).int(), self._int64([len(tokens)]).int()
                scores = perturbed_scores(logits, row, place, tables)[0]
                best, second = scores.topk(2).values.tolist()
                tokens.append(int(scores.argmax()))
                margins.append(best - second if math.isfinite(second) else math.inf)
                reason = self._finish_reason(tokens, params)
                if reason is not None:
                    is_eos = tokens[-1] == self.config.eos_token_id and not params.ignore_eos
                    return NaiveAnswer(tokens, reason, None if reason == "length" or is_eos else tokens[-1], margins)
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
        ids = torch.nn.functional.pad(ids, (padding, 0), value=self.config.embedder.pad_token_id)
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

    def _decoder(self, name: str, config: DecoderConfig, x: Tensor, keys_seen: Tensor | None) -> Tensor:
        """GPT-NeoX layers and final norm over x [B, T, H], causal; keys_seen [B, T] bool takes keys away."""
        length = x.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None]
        if keys_seen is not None:
            visible = visible & keys_seen[:, None]
        for index in range(config.num_layers):
            layer = f"{name}.layers.{index}"
            for_attention = self._norm(f"{layer}.input_layernorm", config, x)
            for_ffn = self._norm(f"{layer}.post_attention_layernorm", config, x)
            inner = self._linear(f"{layer}.mlp.dense_h_to_4h", for_ffn)
            gelu = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
            attention = self._attention(f"{layer}.attention", config, for_attention, visible)
            x = x + attention + self._linear(f"{layer}.mlp.dense_4h_to_h", gelu)
        return self._norm(f"{name}.final_layer_norm", config, x)

    def _attention(self, name: str, config: DecoderConfig, x: Tensor, visible: Tensor) -> Tensor:
        """Attention over x [B, T, H]; visible [B or 1, T, T] is True where a query (row) sees a key (column)."""
        heads = self._linear(f"{name}.query_key_value", x).unflatten(-1, (config.num_heads, 3, config.head_size))
        query, key, value = heads.unbind(-2)  # [B, T, heads, D] each
        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(query, config), rotate(key, config)) * config.head_size**-0.5
        # The lowest number rather than -inf: a query in front of all that it may see has to stay a number.
        scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
        attended = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
        return self._linear(f"{name}.dense", attended.flatten(2))

    def _norm(self, name: str, config: DecoderConfig, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return normed * self._tensors[f"{name}.weight"] + self._tensors[f"{name}.bias"]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self._tensors[f"{name}.weight"].T + self._tensors[f"{name}.bias"]

    def _align(self, prompt: Sequence[int], alignment: PromptAlignment) -> tuple[list[list[int]], list[int]]:
        """The prompt's blocks, and the tokens that are forced on the block behind them."""
        length = self.config.block_length
        rest = len(prompt) % length
        forced: list[int] = []
        tokens = list(prompt)
        if rest and (alignment == "left_pad" or len(prompt) < length):
            tokens = [self.config.embedder.pad_token_id] * (length - rest) + tokens
        elif rest:
            tokens, forced = tokens[:-rest], tokens[-rest:]
        return [tokens[start : start + length] for start in range(0, len(tokens), length)], forced

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


def rotate(x: Tensor, config: DecoderConfig) -> Tensor:
    """Rotate x [B, T, heads, D] at positions 0..T-1: the first `rotary_dims` dimensions, paired in two halves."""
    half = config.rotary_dims // 2
    frequencies = config.rotary_base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    positions = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
    angles = (positions[:, None] * frequencies)[:, None]  # [T, 1, half]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
