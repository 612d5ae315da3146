"""Quantize the linear layers, and the fused experts, of a whole model."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard, TypeVar

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from qlora_ext.dense_linear import (
    conv1d_class,
    falcon_class,
    has_float_weight,
    is_dense_linear,
    out_and_in,
)
from qlora_ext.experts import fused_experts, quantize_experts
from qlora_ext.layer_hooks import check_not_hooked, has_other_forward
from qlora_ext.layer_names import is_within, plain_modules
from qlora_ext.linear import Linear4bit
from qlora_ext.lora.adapter_table import AdapterTable
from qlora_ext.lora.linear import LoraLinear, base_of
from qlora_ext.model_config import mark_configs
from qlora_ext.model_layers import (
    HEADS,
    check_not_lazy,
    check_not_merged,
    closed_modules,
    expert_layers,
    layers_of,
    linear_layers,
    output_head,
    replace_layers,
)
from qlora_ext.sharded import check_weight_is_whole, reshard
from qlora_ext.weight_4bit import Weight4bit

Model = TypeVar("Model", bound=nn.Module)
_FIRST = "quantize_model comes before fully_shard"
_IF_PLAIN = "one that computes as nn.Linear does may become it: layer.__class__ = nn.Linear"
_IF_IN_BITS = "the weights of some are no floats: load the model without quantization_config"


def quantize_model(
    model: Model,
    *,
    skip: Iterable[str] = HEADS,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
) -> Model:
    """Replace each nn.Linear of the model by a Linear4bit, in place, one by one: at the peak one layer is held twice.

    transformers' Conv1D (GPT-2's linear layer) and FalconLinear (without its rounding before the bias) are replaced,
    too, and the fused experts of its mixtures by Experts4bit (`qlora_ext/experts.py`), for which the model changes to
    transformers' "grouped_mm" implementation of experts.

    Args:
        model: any module, on any device ("meta" too). Adapters in it, not merged, stay on their layers.
        skip: layers, experts or modules to leave as they are, with all inside them: whole names, or last parts. The
            default is the heads: lm_head, score, classifier, qa_outputs, and the model's output embeddings under any
            name; names given here replace it. Left too are layers whose weight is tied to another module's, those that
            a transformers model keeps in float32 (T5's wo), and all within nn.MultiheadAttention and
            nn.TransformerEncoderLayer (warns), whose weights torch hands to kernels of its own.
        quant_type, blocksize, double_quant: as for `quantize_4bit`.

    Returns:
        The same model. Warns if a name in skip is that of no linear layer or weight of experts, nor of a module around
        one, and if most of the model's weights are left in 3-D tensors, as experts that are fused in another way, or
        in subclasses of nn.Linear, which may compute otherwise.

    Raises:
        TypeError: model is no nn.Module; skip is no str and no list of them.
        ValueError: there is no layer to quantize below the model; one has hooks, or a forward that is not its class's;
            merged adapters, or PEFT's; a parameter has no shape yet (nn.LazyLinear's); fully_shard has sharded a
            layer. A weight holds NaN or Inf: the layers before it stay quantized.

    Source: QLoRA, arXiv 2305.14314, section 3.
    """
    _check_model(model)
    skip = _names(skip)
    reshard(model)
    left = _Left(model, skip)
    _warn_of_names(model, skip)
    linears = _linears_to_replace(model, left)
    experts = _experts_to_replace(model, left)
    closed = sorted({kind for name, kind in closed_modules(model).items() if not is_within(name, skip)})
    if not linears and not experts:
        raise ValueError(f"quantize_model: model: {_why_none(model, left, closed)}")
    options: dict[str, Any] = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}

    def convert(name: str, module: nn.Module) -> nn.Module:
        if name not in linears:
            return module
        with _naming(name):
            layer = Linear4bit.from_linear(base_of(module), **options)
        if not isinstance(module, LoraLinear):
            return layer
        module.base_layer = layer
        return module

    mark_configs(model)
    replace_layers(model, convert)
    for name, module, weight in experts:
        with _naming(name):
            quantize_experts(module, weight, **options)
    _warn_of_experts(model)
    _warn_of_subclasses(model, left)
    if closed:
        stay = f"layers within {', '.join(closed)} stay as they are: torch hands their weights to kernels of its own"
        warnings.warn(f"quantize_model: model: {stay}", UserWarning, stacklevel=2)
    return model


def weights_to_quantize(model: nn.Module, *, skip: Iterable[str] = HEADS) -> list[str]:
    """The names of the weights that `quantize_model(model, skip=skip)` would store in 4 bits, of layers and of experts.

    For who loads a model weight by weight, and quantizes each as it comes.
    """
    skip = _names(skip)
    left = _Left(model, skip)
    _warn_of_names(model, skip)
    experts = [name for name, *_ in _experts_to_replace(model, left)]
    return [*(f"{name}.weight" for name in _linears_to_replace(model, left)), *experts]


def quantizable(model: nn.Module) -> list[str]:
    """The names of the linear layers and of fused experts' weights."""
    fused = [f"{name}.{weight}".removeprefix(".") for name, m in plain_modules(model) for weight in fused_experts(m)]
    return [*linear_layers(model), *fused, *expert_layers(model)]


class _Left:
    """What stays as it is: all in `skip`, or by default the heads under any name; tied weights; and what transformers
    keeps in float32."""

    def __init__(self, model: nn.Module, skip: tuple[str, ...]) -> None:
        self.skip = skip
        self.head = output_head(model) if skip is HEADS else set()
        self._owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        kept = [_kept_in_fp32(module) for module in model.modules()]
        self._in_fp32 = re.compile("|".join(rf"(^|\.){name}($|\.)" for name in sorted(set().union(*kept))) or "$^")

    def has(self, name: str, parameter: str, weight: Tensor) -> bool:
        is_tied = self._owners[id(weight)] != 1
        return is_tied or name in self.head or is_within(name, self.skip) or bool(self._in_fp32.search(parameter))


def _linears_to_replace(model: nn.Module, left: _Left) -> set[str]:
    """The names of the layers; raise ValueError, before any is replaced, if one cannot be."""
    names = set()
    for name, layer in layers_of(model).items():
        linear = base_of(layer)
        if is_dense_linear(linear) and not left.has(name, f"{name}.weight", linear.weight):
            check_weight_is_whole(f"quantize_model: model: {name}", linear.weight, _FIRST)
            if _is_known(linear):  # never of a class known here if sharded: fully_shard makes a subclass
                check_not_hooked("quantize_model", name, linear)
                names.add(name)
    return names


def _experts_to_replace(model: nn.Module, left: _Left) -> list[tuple[str, nn.Module, str]]:
    """(name, module, name in it) of the weights of fused experts; raise ValueError if one cannot be replaced."""
    found = []
    for path, module in plain_modules(model):
        for weight in fused_experts(module):
            name = f"{path}.{weight}".removeprefix(".")
            if not left.has(name, name, module.get_parameter(weight)):
                check_weight_is_whole(f"quantize_model: model: {name}", module.get_parameter(weight), _FIRST)
                if has_other_forward(module):  # accelerate's knows the weight by its name; other hooks may stay
                    check_not_hooked("quantize_model", path, module)
                found.append((name, module, weight))
    return found


def _why_none(model: nn.Module, left: _Left, closed: list[str]) -> str:
    """What there is in place of a layer to quantize."""
    dense = [base for layer in linear_layers(model).values() if is_dense_linear(base := base_of(layer))]
    others = [base for base in dense if not _is_known(base)]
    got = [f"subclasses of it ({_kinds(others)})"] if others else []
    got += [f"layers within {', '.join(closed)}"] if closed else []
    got += ["layers in 4 bits"] if any(isinstance(m, Weight4bit) for m in model.modules()) else []
    skipped = tuple(dict.fromkeys([*left.skip, *sorted(left.head)]))
    only = f"only {' and '.join(got)}" if got else "none"
    advice = _advice(base for base in others if "weight" in base._parameters)
    hint = f" ({advice})" if advice else ""
    return f"expected an nn.Linear in it that is not in skip={skipped}, got {only}{hint}"


@contextlib.contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Errors say which layer they are of."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"quantize_model: {layer}: {error}") from error


def _names(skip: Iterable[str]) -> tuple[str, ...]:
    names = (skip,) if isinstance(skip, str) or not isinstance(skip, Iterable) else tuple(skip)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"quantize_model: skip: expected names of layers, got {names!r}")
    return names


def _warn_of_names(model: nn.Module, skip: Iterable[str]) -> None:
    """Say which of these names nothing here has, but for a head's, which many give for any model."""
    names = [*quantizable(model), *closed_modules(model)]
    for each in skip:
        if each not in HEADS and not any(is_within(name, [each]) for name in names):
            expected = "names of layers, or of modules with layers, whole or their last parts"
            warnings.warn(f"quantize_model: skip: expected {expected}, got {each!r}", UserWarning, stacklevel=3)


def _warn_of_experts(model: nn.Module) -> None:
    """Say so if 3-D tensors, as transformers fuses experts into, hold more weights than the 4-bit layers do."""
    fused: dict[Tensor, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (Weight4bit, nn.Conv1d, nn.ConvTranspose1d, ParametrizationList, AdapterTable)):
            own = module.named_parameters(name, recurse=False)
            fused |= {p: key for key, p in own if p.dim() == 3 and p.is_floating_point()}
    if (left := sum(p.numel() for p in fused)) > (quantized := _quantized(model)):
        warnings.warn(
            f"quantize_model: model: {left:,} weights stay as they are, in tensors of 3 dimensions (as "
            f"{fused[max(fused, key=Tensor.numel)]}); in 4 bits are {quantized:,}, those of layers",
            UserWarning,
            stacklevel=3,
        )


def _warn_of_subclasses(model: nn.Module, left: _Left) -> None:
    """Say so if layers of subclasses of nn.Linear, as openai-whisper's, hold more weights than the 4-bit layers do."""
    layers = [(name, base_of(layer)) for name, layer in linear_layers(model).items()]
    # A parametrized layer has a class of its own, too, but it computes its weight, and cannot become a plain one.
    own = [(n, m) for n, m in layers if is_dense_linear(m) and not _is_known(m) and "weight" in m._parameters]
    stay = [m for name, m in own if not left.has(name, f"{name}.weight", m.weight)]
    if (weights := sum(math.prod(out_and_in(m)) for m in stay)) > (quantized := _quantized(model)):
        warnings.warn(
            f"quantize_model: model: {weights:,} weights stay as they are, in subclasses of nn.Linear ({_kinds(stay)}; "
            f"{_advice(stay)}); in 4 bits are {quantized:,}",
            UserWarning,
            stacklevel=3,
        )


def _kinds(layers: Iterable[nn.Linear]) -> str:
    """The names of their classes; with their modules where weights are no floats, as of bitsandbytes' Linear4bit."""
    kinds = {(type(layer).__module__, type(layer).__name__)[has_float_weight(layer) :] for layer in layers}
    return ", ".join(sorted(map(".".join, kinds)))


def _advice(layers: Iterable[nn.Linear]) -> str:
    """What may be done to quantize layers of subclasses of nn.Linear."""
    return "; ".join(sorted({_IF_PLAIN if has_float_weight(layer) else _IF_IN_BITS for layer in layers}))


def _quantized(model: nn.Module) -> int:
    """How many weights are in 4 bits."""
    return sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, Weight4bit))


def _is_known(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A subclass may use its weight in its own way, as nn.MultiheadAttention does with out_proj's."""
    return type(module) in (nn.Linear, conv1d_class(type(module)), falcon_class(type(module)))


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_model: model: expected an nn.Module, got {type(model).__name__}")
    if is_dense_linear(model):
        expected = "a module with layers in it to replace (for one layer: Linear4bit.from_linear)"
        raise ValueError(f"quantize_model: model: expected {expected}, got {type(model).__name__} itself")
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        expected = "a plain model, to be quantized before PEFT wraps it, or add_adapter in PEFT's place"
        raise ValueError(f"quantize_model: model: expected {expected}, got modules of PEFT in it")
    check_not_merged("quantize_model", model)
    check_not_lazy("quantize_model", model)


def _kept_in_fp32(module: nn.Module) -> set[str]:
    """What a transformers model says of layers that lose too much in fewer bits: parts of names of their parameters."""
    names = (getattr(module, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    return {each for some in names if some is not None for each in some}
