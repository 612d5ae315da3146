"""Experts4bit: the weights of fused experts, a tensor [experts, out, in] of a mixture's model, in 4 bits.

transformers keeps them so, and multiplies by all of them in one call: torch's grouped_mm takes rows that are sorted by
expert ("grouped_mm", transformers' own default). Here it takes Experts4bit in the place of the weight: one op
multiplies each expert's rows by its matrix, and decodes it inside the multiply. What the model does around the products
remains its own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_ext._ops import NESTED_BLOCKSIZE, ops
from qlora_ext.experts_autograd import check_no_tangents
from qlora_ext.functional import cast_as_autocast
from qlora_ext.weight_4bit import Weight4bit

GROUPED_MM = ("_grouped_mm", "grouped_mm_fallback")  # torch's and, where that would not compile, transformers'


class Stack4bit(Weight4bit):
    """The matrices of one weight [experts, rows, columns], one below the other."""

    def __init__(self, shape: torch.Size, *, is_transposed: bool, **options: Any) -> None:
        experts, rows, columns = shape
        super().__init__(columns, experts * rows, bias=False, **options)
        self.shape = shape
        self.is_transposed = is_transposed

    @property
    def sizes(self) -> tuple[int, int]:
        """in and out of the products with a matrix."""
        _, rows, columns = self.shape
        return (rows, columns) if self.is_transposed else (columns, rows)

    def forward(
        self,
        input: Tensor,
        offs: Tensor,
        A: Sequence[Tensor] = (),
        B: Sequence[Tensor] = (),
        scaling: Sequence[float] = (),
    ) -> Tensor:
        """Each matrix times its rows: [rows, in] -> [rows, out], in one op.

        Args:
            input, offs: as for Experts4bit.
            A, B, scaling: of LoraExperts' adapters, [experts, r, in] and [experts, out, r].
        """
        check_no_tangents("Experts4bit", input, *A, *B)
        x, (_, size) = cast_as_autocast(input), self.sizes
        product = (x, *self._tensors(), self.quant_type, self.blocksize, offs, size, self.is_transposed)
        y: Tensor = ops.lora_experts_4bit(*product, A, B, scaling)[0] if A else ops.experts_4bit(*product)
        return y


class Experts4bit(nn.Module):
    """A frozen weight of several matrices of one shape in 4 bits, which torch's grouped_mm takes for its mat_b.

    `F.grouped_mm(x, experts.transpose(-2, -1), offs=offs)`, or where matrices are [in, out] `F.grouped_mm(x, experts,
    offs=offs)`, is what it is of the decoded weight, in x's dtype (autocast's, where that is on), with a gradient for
    x. With adapters (LoraExperts) each matrix has an update of its own.

    Args:
        weight: float32, float16 or bfloat16 [experts, rows, columns] (on "meta": this is on "meta" too).
        is_transposed: whether the matrices are [in, out], so that the products are x @ W; else they are F.linear's.
        quant_type, blocksize: as for `quantize_4bit`.
        double_quant: absmax in 8 bits, if a matrix has whole groups of 256 of them (else float32).

    Attributes:
        shape: of the weight.
        stack: the storage of all matrices, a Stack4bit; with adapters a LoraExperts around it.

    Raises:
        TypeError, ValueError: as Linear4bit, or a block would reach from one matrix into the next.
    """

    replaced: Any = None  # by quantize_experts: the weight's name, the module's config

    def __init__(
        self,
        weight: Tensor,
        *,
        is_transposed: bool = False,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
    ) -> None:
        super().__init__()
        let_compilers_in()
        if weight.dim() != 3:
            raise ValueError(f"Experts4bit: weight: expected [experts, rows, columns], got {list(weight.shape)}")
        self.shape = weight.shape
        self.stack: Any = Stack4bit(
            weight.shape,
            is_transposed=is_transposed,
            quant_type=quant_type,
            blocksize=blocksize,
            double_quant=double_quant,
            dtype=weight.dtype,
            device="meta",
        )
        _, rows, columns = weight.shape
        if rows * columns % blocksize != 0:
            expected = f"matrices of whole blocks of {blocksize} elements"
            raise ValueError(f"Experts4bit: weight: expected {expected}, got {rows} x {columns}")
        if rows * columns % (blocksize * NESTED_BLOCKSIZE) != 0:
            self.stack.double_quant = False
        self.quantize_(weight)

    def __setstate__(self, state: dict[str, Any]) -> None:
        let_compilers_in()  # of a process that made none
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def quantize_(self, weight: Tensor) -> None:
        """Replace the weight, without adapters' updates, on that tensor's device; raises as Linear4bit.quantize_."""
        if weight.shape != self.shape:
            raise ValueError(f"Experts4bit: weight: expected shape {list(self.shape)}, got {list(weight.shape)}")
        self.base.quantize_(weight.flatten(0, 1))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [experts, rows, columns], with the active adapters' updates, in `dtype` (None: the original's)."""
        weight: Tensor = self.stack.dequantize(dtype)
        return weight.view(self.shape)

    @property
    def base(self) -> Stack4bit:
        """The storage without adapters."""
        base: Stack4bit = getattr(self.stack, "base_layer", self.stack)
        return base

    @property
    def dtype(self) -> torch.dtype:
        """Of the original weight."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.weight.device

    def transpose(self, dim0: int, dim1: int) -> Transposed:
        """The weight with its last two dimensions exchanged, for grouped_mm alone."""
        if sorted(dim % 3 for dim in (dim0, dim1)) != [1, 2]:
            raise ValueError(f"Experts4bit: transpose: expected the last two dimensions, got {dim0} and {dim1}")
        return Transposed(self)

    def forward(self, input: Tensor, offs: Tensor) -> Tensor:
        """Each matrix times its rows: [rows, in] -> [rows, out].

        Args:
            input: the rows, sorted by matrix.
            offs: [experts], where the rows of each matrix end; the results of rows behind the last are zeros.

        Raises:
            ValueError: other shapes, or offs that do not ascend or end behind the last row.
        """
        size, _ = self.base.sizes
        if input.dim() != 2 or input.shape[1] != size:
            raise ValueError(f"Experts4bit: mat_a: expected [rows, {size}], got {list(input.shape)}")
        if offs.dtype not in (torch.int32, torch.int64) or tuple(offs.shape) != self.shape[:1]:
            expected, got = f"integers [{self.shape[0]}]", f"{offs.dtype} {list(offs.shape)}"
            raise ValueError(f"Experts4bit: offs: expected {expected}, got {got}")
        y: Tensor = self.stack(input, offs)
        return y

    def extra_repr(self) -> str:
        return f"shape={list(self.shape)}"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _grouped_mm(*args, **(kwargs or {})) if func.__name__ in GROUPED_MM else NotImplemented


class Transposed:
    """Experts4bit with its last two dimensions exchanged."""

    def __init__(self, experts: Experts4bit) -> None:
        self.experts = experts
        self.dtype, self.device = experts.dtype, experts.device

    __torch_function__ = Experts4bit.__torch_function__


def _grouped_mm(
    mat_a: Tensor,
    mat_b: Experts4bit | Transposed,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if not isinstance(mat_a, Tensor) or offs is None or bias is not None or out_dtype is not None:
        got = [type(each).__name__ for each in (mat_a, mat_b, offs, bias, out_dtype)]
        raise ValueError(f"Experts4bit: grouped_mm: expected a tensor, the experts and offs alone, got {got}")
    experts = mat_b.experts if isinstance(mat_b, Transposed) else mat_b
    if isinstance(mat_b, Transposed) == experts.base.is_transposed:
        expected = "the experts themselves" if experts.base.is_transposed else "experts.transpose(-2, -1)"
        raise ValueError(f"Experts4bit: mat_b: expected {expected}, got {type(mat_b).__name__}")
    y: Tensor = experts(mat_a, offs)
    return y


def let_compilers_in() -> None:
    """Make torch.compile honour __torch_function__ in grouped_mm, as it does in the functions of torch.overrides."""
    with _LOCK:
        _substitute_grouped_mm()


_LOCK = threading.Lock()


@functools.cache
def _substitute_grouped_mm() -> None:
    def grouped_mm(mat_a: Any, mat_b: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
        product = _grouped_mm if isinstance(mat_b, (Experts4bit, Transposed)) else torch._grouped_mm
        return product(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)

    with contextlib.suppress(ValueError):  # who has done so before leaves the compiler a break in its graph
        torch.compiler.substitute_in_graph(F.grouped_mm, skip_signature_check=True)(grouped_mm)


def fused_experts(module: nn.Module) -> list[str]:
    """The attributes in which a module of transformers has the weights of fused experts, if its forward can be made of
    grouped_mm: `use_experts_implementation` marks those modules by attributes that it gives them."""
    if not (hasattr(module, "is_transposed") and hasattr(getattr(module, "config", None), "_experts_implementation")):
        return []
    own = module.named_parameters(recurse=False)
    return [name for name, weight in own if weight.dim() == 3 and weight.is_floating_point()]


def quantize_experts(module: Any, name: str, **options: Any) -> None:
    """Put Experts4bit in the place of a weight that `fused_experts` names; the module's forward computes with them."""
    weight = module.get_parameter(name)
    experts = Experts4bit(weight, is_transposed=module.is_transposed, **options).train(module.training)
    others = replaced_experts(module)
    experts.replaced = name, next((other.replaced[1] for other in others.values()), module.config)
    # Under a name with the weight's name in it as a word, transformers would save these bytes as that weight.
    module.add_module(f"quantized_{name}_", experts)
    module._parameters[name] = None  # its place among the others, by which PEFT knows it
    for each in module._parameters:
        if (key := f"quantized_{each}_") in module._modules:
            module._modules[key] = module._modules.pop(key)
    object.__setattr__(module, name, experts)
    if not others:
        module.config = copy.deepcopy(module.config)  # which other models may share
        module.config._experts_implementation = "grouped_mm"


def replaced_experts(module: nn.Module) -> dict[str, Experts4bit]:
    """The Experts4bit that quantize_experts has put into it."""
    return {key: child for key, child in module.named_children() if isinstance(child, Experts4bit) and child.replaced}


def dequantize_experts(module: Any) -> None:
    """The inverse, for each weight that quantize_experts has replaced. Another thread may compute meanwhile."""
    config = module.config
    for key, experts in replaced_experts(module).items():
        name, config = experts.replaced
        if module.__dict__.get(name) is experts:  # else it has been given another since
            module.register_parameter(name, nn.Parameter(experts.dequantize(), requires_grad=False))
            del module.__dict__[name]  # an instance attribute, which hides the parameter
        delattr(module, key)
    module.config = config
