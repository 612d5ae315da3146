"""Load a causal language model one tensor at a time, its linear layers quantized as they come.

The model is built without storage, its linears are exchanged for Linear4bit, and each tensor of the checkpoint goes
to the module that owns it, which quantizes it. So the peak is the final model and what one tensor is made of.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

import qlora_ext
from qlora_ext import _C
from qlora_ext.experts import Experts4bit
from qlora_ext.layer_names import is_within
from qlora_ext.model_layers import output_head
from qlora_ext.quantize import quantizable
from qlora_ext.weight_4bit import Weight4bit

from .conversions import converted
from .gguf_file import GgufFile
from .model_folder import ModelFolder

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
OTHER_FORMATS = ["*/*.safetensors"]  # gpt-oss has the same weights once more, in original/
# What a model that computes a buffer of such a name may find in older files; the first two transformers ignores, too.
FORMERLY = {
    r"rotary_emb\.inv_freq": r"(^|\.)rotary_emb\.inv_freq$",
    "position_ids": r"(^|\.)position_ids$",
    r"attention\.bias": r"\.attention\.masked_bias$",
}
EAGER_ON_CPU = 128  # tokens, in bf16: faster than torch's kernel up to 512, but for memory (bench/NOTES.md)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve "auto", "bf16" or "fp32"; "auto" is bfloat16 where the kernels of the device multiply it natively."""
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = "avx512_bf16" in _C.cpu_paths()
        name = "bf16" if native else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def suitable_attention(dtype: torch.dtype, device: torch.device, longest: int) -> str | None:
    """The attention to train with on examples of at most `longest` tokens; None is transformers' own choice."""
    fits = device.type == "cpu" and dtype == torch.bfloat16 and longest <= EAGER_ON_CPU
    return "eager" if fits else None


def open_checkpoint(source: str) -> ModelFolder | GgufFile:
    """Find a model: a Hugging Face folder, a llama-architecture .gguf file, or a hub name (fetched).

    Raises: FileNotFoundError; ValueError when it is not a model of a kind that is read here.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path}: expected a model folder or a .gguf file, got another file")
        return GgufFile(path)
    if not path.is_dir():
        if path.suffix == ".gguf" or path.is_absolute() or source.startswith(".") or source.count("/") > 1:
            raise FileNotFoundError(f"{path}: no such file or folder")
        try:
            path = Path(snapshot_download(source, allow_patterns=HUB_FILES, ignore_patterns=OTHER_FORMATS))
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise FileNotFoundError(f"{source}: no such folder, and not fetched from the hub ({reason})") from error
    return ModelFolder(path)


def load_model(
    checkpoint: ModelFolder | GgufFile,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: dict[str, Any] | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model, in eval mode.

    Args:
        checkpoint: from `open_checkpoint`.
        dtype: of every floating tensor that is not quantized, and of the computation.
        device: where the model goes.
        quantize: options of `qlora_ext.quantize_model`, or None to leave the linears as they are; the heads always are.
        attention: one of transformers' implementations, None for its own choice.

    Warns of tensors of parts that the model is without: that predict further tokens, or layers beyond the config's.

    Raises: ValueError naming the file and the tensor that is damaged, unknown to its layer, missing or mis-shaped, a
    config of which no model can be built, or an attention that the model or the machine does not have.
    """
    config = checkpoint.config()
    usual = attention in (None, "eager")  # of every model, without a package, and perhaps nobody's wish
    built: dict[str, Any] = {"dtype": dtype} | ({} if attention is None else {"attn_implementation": attention})
    # Parameters get no storage but buffers do: those that no checkpoint holds (rotary frequencies) are ready.
    with init_empty_weights(include_buffers=False):
        try:
            model: Any = AutoModelForCausalLM.from_config(config, **built)
        except ImportError as error:
            if usual:
                raise
            raise ValueError(f"--attention {attention}: {error}") from error
        except Exception as error:  # whatever a model's class makes of sizes and names that do not fit
            if "Unrecognized configuration class" in str(error):  # and the names of hundreds
                kind = getattr(config, "model_type", type(config).__name__)
                raise ValueError(f"{checkpoint.path}: expected a causal language model, got {kind}") from error
            how = "" if usual else f" with --attention {attention}"
            raise ValueError(
                f"{checkpoint.path}: expected a config of a model that can be built{how}, "
                f"got {type(error).__name__}: {error}"
            ) from error
    _compute_buffers(model)
    _stream(model, checkpoint, device, quantize)
    if (generation := checkpoint.generation_config()) is not None:
        model.generation_config = generation
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute anew what no checkpoint holds: from_config does it in the model's dtype, from_pretrained in float32.

    In bfloat16 the positions of GPT-J, whole numbers above 256, are wrong before their sine is taken.
    """
    module: Any
    for module in model.modules():
        if module._non_persistent_buffers_set:
            module._is_hf_initialized = False  # by which transformers knows what is left to do
    model.initialize_weights()


def _quantize(model: PreTrainedModel, options: dict[str, Any]) -> None:
    skip = options.get("skip", ())
    names = quantizable(model)
    for name in skip:
        if not any(is_within(layer, [name]) for layer in names):
            raise ValueError(f"--skip: expected names of linear layers or fused experts, got {name!r}")
    qlora_ext.quantize_model(model, **{**options, "skip": (*output_head(model), *skip)})


def _stream(
    model: PreTrainedModel,
    checkpoint: ModelFolder | GgufFile,
    device: torch.device,
    quantize: dict[str, Any] | None,
) -> None:
    # transformers 5.20 does not yet build these modules in float32.
    precise = re.compile("|".join(map(re.escape, model._keep_in_fp32_modules_strict or ())) or r"(?!)")
    expected = {
        name: (tuple(tensor.shape), torch.float32 if precise.search(name) else tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
    tensors = converted(checkpoint, model)
    ignored, modules = _ignored(model), {name for name, _ in model.named_modules()}
    if quantize is not None:
        _quantize(model, quantize)
    missing = set(expected)
    left_out: list[str] = []
    for name, shape, read in tqdm(tensors, total=len(expected), desc="loading", unit="tensor", leave=False):
        owner_name, _, leaf = name.rpartition(".")
        if name not in expected:
            if ignored.search(name):
                continue
            if owner_name in modules:
                raise ValueError(f"{checkpoint.path}: unknown tensor {name!r} for {type(model).__name__}")
            left_out.append(name)
            continue
        wanted, dtype = expected[name]
        if shape != wanted:
            raise ValueError(f"{checkpoint.path}: tensor {name!r}: expected shape {wanted}, got {shape}")
        owner = model.get_submodule(owner_name)
        holder = owner if leaf == "weight" else getattr(owner, leaf, None)
        layer = holder if isinstance(holder, Weight4bit | Experts4bit) else None
        tensor = read(dtype if layer is None else None).to(device)
        try:
            if layer is None:
                owner.load_state_dict({leaf: tensor}, strict=False, assign=True)
            else:  # in its dtype, not the file's
                layer.quantize_(tensor)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{checkpoint.path}: tensor {name!r}: {error}") from error
        missing.discard(name)
    model.tie_weights(missing_keys=missing)
    _check_complete(model, missing, checkpoint.path)
    if left_out:
        what = f"{len(left_out)} tensors of parts that {type(model).__name__} is without"
        warnings.warn(f"{checkpoint.path}: {what} are left out, as {left_out[0]!r}", UserWarning, stacklevel=3)


def _ignored(model: PreTrainedModel) -> re.Pattern[str]:
    """Names of stored tensors to leave out: those that the model's class lists, and what the model computes itself.

    Versions before stored that: the same buffer, one of each layer that is now one of the model, the value of a mask.
    """
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ())]
    for name, _ in model.named_non_persistent_buffers():
        prefix = f"{model.base_model_prefix}."  # which files of models without their head lack
        patterns += [rf"^({re.escape(prefix)})?{re.escape(name.removeprefix(prefix))}$"]
        for ending, before in FORMERLY.items():
            patterns += [before] if re.search(rf"(^|\.){ending}$", name) else []
    return re.compile("|".join(f"({pattern})" for pattern in dict.fromkeys(patterns)) or r"(?!)")


def _check_complete(model: PreTrainedModel, missing: set[str], path: Path) -> None:
    """What nothing has filled is without storage, but for the buffers: of those that files hold, `missing` tells."""
    optional = re.compile("|".join(f"({each})" for each in model._keys_to_ignore_on_load_missing or ()) or r"(?!)")
    unfilled = {name for name, _ in model.named_buffers() if name in missing and not optional.search(name)}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta or name in unfilled:
            raise ValueError(f"{path}: missing tensor {name!r}")
