"""What is served and how: the model's config.json and the engine's settings, validated once and frozen.

Torch-free. `ModelConfig.load` and the constructors raise `ConfigError`, whose message names the field at fault.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

DTYPES = ("float32", "bfloat16", "float16")
DType = Literal["float32", "bfloat16", "float16"]
PromptAlignment = Literal["left_pad", "forced_tail"]
HEAD_SIZES = (16, 32, 64, 128)
"""Head sizes that the decoders' kernels serve."""

Size = Annotated[int, Field(gt=0, le=1 << 31)]


class ConfigError(ValueError):
    """A configuration that cannot be served. The message names the file or field at fault."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class EmbedderConfig(_Frozen):
    """Turns a block's tokens into one vector of the block decoder's width (paper section 2.1)."""

    type: Literal["lookup"] = "lookup"
    hidden_size: Size
    projection: Literal["concat", "projection_layer"] = "concat"
    """concat: block_length vectors side by side. projection_layer: a convolution over them, kernel block_length."""
    pad_token_id: Annotated[int, Field(ge=0)] = 0
    """Stands in front of prompts that do not fill their first block."""


class DecoderConfig(_Frozen):
    """A stack of GPT-NeoX layers with parallel residual and partial rotary embedding."""

    num_layers: Size
    hidden_size: Size
    num_heads: Size
    intermediate_size: Size
    rotary_pct: Annotated[float, Field(gt=0, le=1)] = 0.25
    rotary_base: Annotated[float, Field(gt=1)] = 10000.0
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5

    @property
    def head_size(self) -> int:
        """Dimensions of a head."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_dims(self) -> int:
        """Dimensions of each head that are rotated: the first ones, in two halves."""
        return int(self.head_size * self.rotary_pct)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.head_size not in HEAD_SIZES:
            raise ValueError(
                f"head size (hidden_size / num_heads) is {self.head_size}; it has to be one of {HEAD_SIZES}"
            )
        if self.rotary_dims % 2 or not self.rotary_dims:
            raise ValueError(
                f"rotary_pct {self.rotary_pct} rotates {self.rotary_dims} dimensions of each head, not an even number"
            )
        return self


class TokenDecoderConfig(DecoderConfig):
    """The decoder that writes a block from its context embedding (paper section 2.3)."""

    strategy: Literal["prefix", "summation"] = "prefix"
    prefix_length: Annotated[int, Field(ge=1, le=64)] | None = None
    """Vectors that the context embedding is expanded to, in front of the tokens. Only for strategy "prefix"."""

    @model_validator(mode="after")
    def _strategy(self) -> Self:
        if self.strategy == "prefix" and self.prefix_length is None:
            raise ValueError('prefix_length is missing, which strategy "prefix" needs')
        if self.strategy == "summation" and self.prefix_length is not None:
            raise ValueError('prefix_length goes with strategy "prefix" only')
        return self


class ModelConfig(_Frozen, ABC):
    """What the engine has to know of a model, whatever its kind.

    Every model is a causal decoder over positions, whose keys and values are cached, and a writer that makes
    `block_length` tokens of its output at a position.
    """

    vocab_size: Size
    block_length: Annotated[int, Field(ge=1, le=64)]
    """Tokens of a position."""
    max_length: Size
    """Tokens of prompt and answer together."""
    prompt_alignment: PromptAlignment = "left_pad"
    eos_token_id: Annotated[int, Field(ge=0)] = 0
    dtype: DType = "float32"
    """Of the stored weights, and the default for computing with them on a GPU."""
    block_decoder: DecoderConfig
    """The decoder over positions."""

    @property
    def max_positions(self) -> int:
        """Positions that the longest request has (what is written last is never embedded)."""
        return -(-self.max_length // self.block_length)

    @property
    @abstractmethod
    def pad_token_id(self) -> int:
        """Stands in front of prompts that do not fill their first block."""

    @classmethod
    @abstractmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The config that a decoded config.json describes. Raises pydantic's ValidationError."""

    @model_validator(mode="after")
    def _tokens(self) -> Self:
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(f"eos_token_id {self.eos_token_id} is outside the vocabulary of {self.vocab_size}")
        if self.max_length < 2 * self.block_length:
            raise ValueError(
                f"max_length {self.max_length} is under two blocks of {self.block_length}: nothing could be generated"
            )
        return self

    @classmethod
    def parse(cls, data: dict[str, Any], source: str = "config.json") -> Self:
        """Validate a decoded config.json of the kind that its `model_type` names.

        Raises ConfigError naming `source` and the field, also where the model is none of this class's kind.
        """
        kinds = {name: kind for name, kind in MODEL_KINDS.items() if issubclass(kind, cls)}
        model_type = data.get("model_type", DEFAULT_MODEL_TYPE)
        if not isinstance(model_type, str) or model_type not in kinds:
            allowed = " or ".join(f"'{name}'" for name in kinds)
            raise ConfigError(f"{source}: model_type: Input should be {allowed} (got {str(model_type)[:80]!r})")
        try:
            config = kinds[model_type].from_json(data)
        except ValidationError as error:
            raise ConfigError(f"{source}: {describe_validation_error(error)}") from None
        assert isinstance(config, cls)
        return config

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read config.json of a model directory. Raises ConfigError if it is missing or cannot be served."""
        path = directory / "config.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{path} has to hold a JSON object")
        return cls.parse(data, source=str(path))


class BlockTransformerConfig(ModelConfig):
    """config.json of a Block Transformer."""

    model_type: Literal["block_transformer"] = "block_transformer"
    embedder: EmbedderConfig
    token_decoder: TokenDecoderConfig

    @property
    def pad_token_id(self) -> int:
        """The embedder's."""
        return self.embedder.pad_token_id

    @property
    def expanded_vectors(self) -> int:
        """Vectors of the token decoder's width that a context embedding is expanded to."""
        if self.token_decoder.strategy == "prefix":
            assert self.token_decoder.prefix_length is not None
            return self.token_decoder.prefix_length
        return self.block_length

    @property
    def token_decoder_positions(self) -> int:
        """Positions that writing one block takes: the last token of a block is never an input."""
        if self.token_decoder.strategy == "prefix":
            return self.expanded_vectors + self.block_length - 1
        return self.block_length

    @model_validator(mode="after")
    def _embedder(self) -> Self:
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"embedder.pad_token_id {self.pad_token_id} is outside the vocabulary of {self.vocab_size}"
            )
        concatenated = self.embedder.hidden_size * self.block_length
        if self.embedder.projection == "concat" and concatenated != self.block_decoder.hidden_size:
            raise ValueError(
                f"embedder.hidden_size x block_length is {concatenated}, but block_decoder.hidden_size is "
                f'{self.block_decoder.hidden_size}; with embedder.projection "concat" they have to be equal'
            )
        return self

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The file holds the fields of this class."""
        return cls.model_validate(data)


class RopeParameters(_Frozen):
    """`rope_parameters` of Hugging Face's config.json; rotary embeddings of other types are not served."""

    rope_type: Literal["default"] = "default"
    type: Literal["default"] = "default"
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None


class GPTNeoXFile(_Frozen):
    """What Hugging Face's config.json of a GPT-NeoX model says of its computation; its many other fields are ignored.

    Fields that have one value here are there to refuse any other: it would change what the model computes.
    """

    model_config = ConfigDict(extra="ignore")

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    intermediate_size: Size
    max_position_embeddings: Annotated[int, Field(ge=2, le=1 << 31)]
    eos_token_id: Annotated[int, Field(ge=0)]
    layer_norm_eps: float = 1e-5
    hidden_act: Literal["gelu"] = "gelu"
    """Of erf, not one of its approximations."""
    use_parallel_residual: Literal[True] = True
    attention_bias: Literal[True] = True
    tie_word_embeddings: Literal[False] = False
    quantization_config: None = None
    dtype: DType | None = None
    torch_dtype: DType | None = None
    rotary_pct: float | None = None
    rotary_emb_base: float | None = None
    partial_rotary_factor: float | None = None
    rope_theta: float | None = None
    rope_parameters: RopeParameters | None = None
    rope_scaling: RopeParameters | None = None

    @property
    def rotary_pct_given(self) -> float:
        """Part of each head that is rotated: versions of the library write it in different places."""
        return next(iter(self._given("rotary_pct", "partial_rotary_factor")), 0.25)

    @property
    def rotary_base_given(self) -> float:
        """Base of the rotary frequencies: versions of the library write it in different places."""
        return next(iter(self._given("rotary_emb_base", "rope_theta")), 10000.0)

    @model_validator(mode="after")
    def _one_rotary_embedding(self) -> Self:
        for names in (("rotary_pct", "partial_rotary_factor"), ("rotary_emb_base", "rope_theta")):
            if len(given := self._given(*names)) > 1:
                raise ValueError(f"{names[0]}, or {names[1]}, has several values: {sorted(given)}")
        return self

    def _given(self, name: str, newer_name: str) -> set[float]:
        places = (self.rope_parameters, self.rope_scaling)
        values = [getattr(self, name), getattr(self, newer_name)] + [getattr(rope, newer_name, None) for rope in places]
        return {value for value in values if value is not None}


class VanillaConfig(ModelConfig):
    """An ordinary GPT-NeoX transformer: a position is a token, and the block decoder is all of its layers."""

    block_length: Literal[1] = 1

    @property
    def pad_token_id(self) -> int:
        """No prompt needs one: a token fills its block."""
        return self.eos_token_id

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The file is that of Hugging Face's GPTNeoXForCausalLM."""
        file = GPTNeoXFile.model_validate(data)
        decoder = DecoderConfig(
            num_layers=file.num_hidden_layers,
            hidden_size=file.hidden_size,
            num_heads=file.num_attention_heads,
            intermediate_size=file.intermediate_size,
            rotary_pct=file.rotary_pct_given,
            rotary_base=file.rotary_base_given,
            layer_norm_eps=file.layer_norm_eps,
        )
        return cls(
            vocab_size=file.vocab_size,
            max_length=file.max_position_embeddings,
            eos_token_id=file.eos_token_id,
            dtype=file.dtype or file.torch_dtype or "float32",
            block_decoder=decoder,
        )


MODEL_KINDS: Mapping[str, type[ModelConfig]] = {"block_transformer": BlockTransformerConfig, "gpt_neox": VanillaConfig}
"""By the `model_type` of config.json."""
DEFAULT_MODEL_TYPE = "block_transformer"


class EngineConfig(_Frozen):
    """How an engine serves its model."""

    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    dtype: DType = "float32"
    max_rows: Annotated[int, Field(ge=1, le=65536)] = 64
    """Requests that run at once."""
    max_waiting: Annotated[int, Field(ge=1, le=1 << 20)] = 2048
    """Requests that may wait for a row; one more is refused."""
    page_size: Literal[8, 16, 32, 64] = 16
    """Positions a page holds."""
    max_step_positions: Annotated[int, Field(ge=1, le=1 << 20)] = 2048
    """Positions one step may work on: decoding rows first, then prompt chunks with what is left."""
    kv_bytes: Annotated[int, Field(gt=0)] | None = None
    """Memory for the KV cache. None: what steps leave of `memory_fraction` of the free memory behind the weights."""
    memory_fraction: Annotated[float, Field(gt=0, le=0.98)] = 0.9
    prefix_cache: bool = True
    """Keep the pages of prompts, and share them between requests with equal prompt prefixes."""
    overlapped: bool = False
    """Plan and commit steps while the device runs the next one. False: one step at a time, from plan to commit."""
    cuda_graphs: bool = True
    """On CUDA, replay decode steps and small prefills as graphs instead of launching their kernels one by one."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f'device "{self.device}" is none of cpu, cuda, cuda:N')
        if self.max_step_positions <= self.max_rows:
            raise ValueError(
                f"max_step_positions {self.max_step_positions} has to exceed max_rows {self.max_rows}, "
                "or a full batch leaves no room for prompts"
            )
        return self

    @classmethod
    def create(cls, **values: Any) -> Self:
        """The constructor, raising ConfigError instead of pydantic's ValidationError."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError(describe_validation_error(error)) from None


def describe_validation_error(error: ValidationError) -> str:
    """One sentence a field at fault: `block_decoder.num_heads: Input should be greater than 0 (got -1)`."""
    parts = []
    for item in error.errors(include_url=False):
        where = ".".join(str(step) for step in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] not in ("value_error", "missing", "extra_forbidden"):
            message += f" (got {str(item['input'])[:80]!r})"
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts)
