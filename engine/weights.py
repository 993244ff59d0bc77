"""Reads a model's weights from safetensors files, or draws random ones.

Everything that can be wrong with a model directory is found by reading headers, before memory is taken.
"""

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import BlockTransformerConfig, ConfigError, DecoderConfig, ModelConfig

CPU = torch.device("cpu")
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
STORED_DTYPES = ("F32", "BF16", "F16")
READERS = 8
"""Tensors that are read at once."""
PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth")
STRAYS = re.compile(
    r"block_decoder\.gpt_neox\.embed_in\.weight"
    r"|((block|token)_decoder\.)?gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
)
"""Tensors that checkpoints are known to hold and that no computation reads."""

logger = logging.getLogger(__name__)


class WeightsError(ConfigError):
    """Weights that cannot be served. The message names the file or tensor at fault."""


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the model needs, named as checkpoints of its kind name them."""
    if isinstance(config, BlockTransformerConfig):
        return _block_transformer_shapes(config)
    return _vanilla_shapes(config)


def load_weights(directory: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Read the weights that `config` needs from `model.safetensors`, or from the shards that its index lists.

    Stored float32, bfloat16 and float16 are converted to `dtype`. Tensors that the model does not use are logged by
    name. Raises WeightsError where a file or tensor is missing, damaged, of another shape or type, or holds NaN or
    infinity.
    """
    expected = expected_shapes(config)
    with ExitStack() as stack:
        files = [(path, stack.enter_context(_open(path))) for path in _find_files(directory)]
        where = _check_headers(files, expected, directory)

        def read(name: str) -> tuple[Tensor, Tensor]:
            _, handle = files[where[name]]
            return _convert(handle.get_tensor(name), dtype, device)

        # A read waits for the disk, or copies: other threads go on meanwhile.
        with ThreadPoolExecutor(READERS) as readers:
            converted = dict(zip(expected, readers.map(read, expected), strict=True))
        # One wait for the device, and not one a tensor.
        finite = torch.stack([flag for _, flag in converted.values()]).tolist()
        for name, good in zip(converted, finite, strict=True):
            if not good:
                path, handle = files[where[name]]
                raise _not_finite(handle.get_tensor(name), dtype, name, path)
    return {name: tensor for name, (tensor, _) in converted.items()}


def random_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int, drawn_on: torch.device = CPU
) -> dict[str, Tensor]:
    """Weights as before training: normal (std 0.02) matrices, zero biases, unit norms.

    They do not depend on `device`, but on where they are drawn: a GPU takes a hundredth of a CPU's time for it.
    """
    generator = torch.Generator(drawn_on).manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        if name.endswith(".bias"):
            tensor = torch.zeros(shape)
        elif "layernorm" in name or "layer_norm" in name:
            tensor = torch.ones(shape)
        else:
            tensor = torch.empty(shape, device=drawn_on).normal_(std=0.02, generator=generator)
        tensors[name] = tensor.to(device, dtype)
    return tensors


def _block_transformer_shapes(config: BlockTransformerConfig) -> dict[str, tuple[int, ...]]:
    """Named as the reference's checkpoints name them."""
    vocab, length = config.vocab_size, config.block_length
    width, token_width = config.block_decoder.hidden_size, config.token_decoder.hidden_size
    expanded = config.expanded_vectors * token_width
    shapes: dict[str, tuple[int, ...]] = {"embedder.embeddings.weight": (vocab, config.embedder.hidden_size)}
    if config.embedder.projection == "projection_layer":
        shapes["embedder.projection_layer.weight"] = (width, config.embedder.hidden_size, length)
        shapes["embedder.projection_layer.bias"] = (width,)
    shapes |= _decoder_shapes(config.block_decoder, "block_decoder.gpt_neox")
    shapes |= _decoder_shapes(config.token_decoder, "token_decoder.gpt_neox")
    return shapes | {
        "token_decoder.gpt_neox.embed_in.weight": (vocab, token_width),
        "token_decoder.expansion_layer.weight": (expanded, width, 1),
        "token_decoder.expansion_layer.bias": (expanded,),
        "token_decoder.embed_out.weight": (vocab, token_width),
    }


def _vanilla_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Named as Hugging Face's GPTNeoXForCausalLM names them."""
    table = (config.vocab_size, config.block_decoder.hidden_size)
    layers = _decoder_shapes(config.block_decoder, "gpt_neox")
    return {"gpt_neox.embed_in.weight": table} | layers | {"embed_out.weight": table}


def _decoder_shapes(config: DecoderConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    width, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(config.num_layers):
        layer = f"{prefix}.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{layer}.{norm}.weight": (width,), f"{layer}.{norm}.bias": (width,)}
        for name, (rows, columns) in {
            "attention.query_key_value": (3 * width, width),
            "attention.dense": (width, width),
            "mlp.dense_h_to_4h": (inner, width),
            "mlp.dense_4h_to_h": (width, inner),
        }.items():
            shapes |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
    return shapes | {f"{prefix}.final_layer_norm.weight": (width,), f"{prefix}.final_layer_norm.bias": (width,)}


def _find_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory."""
    if (directory / INDEX_FILE).is_file():
        return _read_index(directory / INDEX_FILE)
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    pickled = sorted(path.name for pattern in PICKLED for path in directory.glob(pattern))
    if pickled:
        raise WeightsError(
            f"{directory} holds weights only as {', '.join(pickled)}: pickles, which can run any code when loaded,"
            f" so they are not read; where you trust them, convert them to {SINGLE_FILE} (safetensors.torch.save_file)"
        )
    raise WeightsError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_index(index: Path) -> list[Path]:
    """The shards that an index lists."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except OSError as error:
        raise WeightsError(f"cannot read {index}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{index} is not valid JSON: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise WeightsError(f'{index} has to hold an object "weight_map" from tensor names to file names') from None
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise WeightsError(f'{index}: the files in "weight_map" have to be names of files beside it')
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise WeightsError(f"{index} lists files that are not there: {', '.join(missing)}")
    return [index.parent / name for name in names]


def _open(path: Path) -> safe_open:
    """Open a safetensors file, which checks that its header and its length fit together."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise WeightsError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from None
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error}") from None


def _check_headers(
    files: list[tuple[Path, safe_open]], expected: dict[str, tuple[int, ...]], directory: Path
) -> dict[str, int]:
    """Compare the files' headers with `expected`. Returns the file (its place in `files`) that holds each tensor."""
    where: dict[str, int] = {}
    unused: list[str] = []
    for place, (path, handle) in enumerate(files):
        for name in handle.keys():  # noqa: SIM118 (a file is no mapping)
            if name not in expected:
                if not STRAYS.fullmatch(name):
                    unused.append(name)
                continue
            if name in where:
                raise WeightsError(f"{name} is in both {files[where[name]][0].name} and {path.name} of {directory}")
            where[name] = place
            header = handle.get_slice(name)
            shape, stored = tuple(header.get_shape()), header.get_dtype()
            if shape != expected[name]:
                raise WeightsError(
                    f"{path}: {name} has shape {list(shape)}, but config.json asks for {list(expected[name])}"
                )
            if stored not in STORED_DTYPES:
                raise WeightsError(f"{path}: {name} is stored as {stored}, which is none of {', '.join(STORED_DTYPES)}")
    if missing := [name for name in expected if name not in where]:
        raise WeightsError(f"{directory} lacks {len(missing)} of {len(expected)} weights: {_some(missing)}")
    if unused:
        logger.warning(
            "%s holds %d tensors that the model does not use: %s", directory, len(unused), _some(sorted(unused))
        )
    return where


def _convert(stored: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A copy that does not depend on the file any more, and whether all of it is finite ([], not waited for)."""
    tensor = stored.to(device=device, dtype=dtype, copy=True)
    return tensor, tensor.isfinite().all()


def _not_finite(stored: Tensor, dtype: torch.dtype, name: str, path: Path) -> WeightsError:
    """What is wrong with a tensor that is not finite as `dtype`."""
    if bool(stored.isfinite().all()):
        return WeightsError(
            f"{path}: {name} does not fit in {str(dtype).removeprefix('torch.')}; serve with another dtype"
        )
    return WeightsError(f"{path}: {name} holds NaN or infinity")


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
