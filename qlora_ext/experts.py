"""Experts4bit: the weights of fused experts, a tensor [experts, out, in] of a mixture's model, in 4 bits.

The models of transformers keep them so. Their own forward ("eager") multiplies by the matrices of those experts alone
that have tokens: `F.linear(x, weight[i])`, or `x @ weight[i]` where they are [experts, in, out]. Each is one op here,
which decodes the matrix inside the multiply; what the model does around them remains its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_ext._ops import NESTED_BLOCKSIZE, ops
from qlora_ext.functional import cast_as_autocast
from qlora_ext.linear import Linear4bit
from qlora_ext.sharded import is_fully_sharded

# Factors of adapters, and the parts of each, in a forward that is under way.
Split = dict[Tensor, tuple[Tensor, ...]]


class Stack4bit(Linear4bit):
    """The matrices of one weight [experts, rows, columns], one below the other.

    Its call gives one of them, as an argument of products. It is a call, because it is in calls that accelerate has in
    memory what it offloads.
    """

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

    def forward(self, index: int, split: Split | None = None) -> Matrix4bit:  # type: ignore[override]
        """The matrix with this number; `split` is for LoraExperts."""
        *of_each, nested_offset = self._tensors()
        experts, rows, columns = self.shape
        own = [None if t is None else t.view(experts, -1, *t.shape[1:])[index] for t in of_each]
        return Matrix4bit(rows, columns, *own, nested_offset, self.quant_type, self.blocksize)


class Experts4bit(nn.Module):
    """A frozen weight of several matrices of one shape in 4 bits, for products with one of them at a time.

    `F.linear(x, experts[i], bias)` is `F.linear(x, weight[i], bias)`, and `x @ experts[i]` is `x @ weight[i]`, with
    gradients for x and bias. With adapters (LoraExperts) each matrix has an update of its own.

    Args:
        weight: float32, float16 or bfloat16 [experts, rows, columns] (on "meta": this is on "meta" too).
        is_transposed: whether the matrices are [in, out], so that the products are x @ W; else they are F.linear's.
        quant_type, blocksize: as for `quantize_4bit`.
        double_quant: absmax in 8 bits, where a matrix has whole groups of 256 of them.

    Attributes:
        shape: of the weight.
        stack: the storage of all matrices, a Stack4bit; with adapters a LoraExperts around it.
        split: of adapters' factors, while the module whose weight this was computes; else None. A graph of its own for
            each forward: FSDP2 has let go of gradients by the time at which an older one's would come.

    Raises:
        TypeError, ValueError: as Linear4bit, or a block would reach from one matrix into the next.
    """

    replaced: Any = None  # by quantize_experts: the weight's name, the module's config
    split: Split | None = None

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

    def quantize_(self, weight: Tensor) -> None:
        """Replace the weight, without adapters' updates, on that tensor's device; raises as Linear4bit.quantize_."""
        if weight.shape != self.shape:
            raise ValueError(f"Experts4bit: weight: expected shape {list(self.shape)}, got {list(weight.shape)}")
        getattr(self.stack, "base_layer", self.stack).quantize_(weight.flatten(0, 1))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [experts, rows, columns], with the active adapters' updates, in `dtype` (None: the original's)."""
        weight: Tensor = self.stack.dequantize(dtype)
        return weight.view(self.shape)

    def __getitem__(self, index: int | Tensor) -> Matrix4bit:
        """One matrix, as an argument of products.

        Raises:
            ValueError: fully_shard is on this or the stack: what that gives is gone after the call.
        """
        if is_fully_sharded(self) or is_fully_sharded(self.stack):
            got = f"{type(self).__name__} with {type(self.stack).__name__}"
            raise ValueError(f"Experts4bit: expected fully_shard on the module of the experts or one above, got {got}")
        matrix: Matrix4bit = self.stack(int(index), self.split)
        return matrix

    def extra_repr(self) -> str:
        return f"shape={list(self.shape)}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "split": None}  # it is still there after Ctrl-C in a forward, and cannot be copied


class Matrix4bit:
    """A matrix in 4 bits, by the arguments with which the ops take it, for torch's products to take.

    Attributes:
        A, B, scaling: of adapters, [r, in] and [out, r]; as for lora_linear_4bit.
    """

    def __init__(self, rows: int, columns: int, *weight: Any) -> None:
        self.rows, self.columns = rows, columns
        self.weight = weight
        self.A: list[Tensor] = []
        self.B: list[Tensor] = []
        self.scaling: list[float] = []

    def float(self) -> Matrix4bit:
        """Itself: products decode it to the dtype of their other argument."""
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        product = PRODUCTS.get(func)
        if product is None or any(isinstance(first, cls) for first in args[:1]):
            return NotImplemented
        return product(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Matrix4bit, bias: Tensor | None = None) -> Tensor:
    x = _checked(input, weight.columns)
    if not weight.A:
        y: Tensor = ops.linear_4bit(x, *weight.weight, weight.rows, bias)
        return y
    y, *_ = ops.lora_linear_4bit(x, *weight.weight, weight.rows, bias, weight.A, weight.B, weight.scaling, [])
    return y


def _matmul(input: Tensor, other: Matrix4bit) -> Tensor:
    x = _checked(input, other.rows)
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):  # the operator @ hides a TypeError
        raise ValueError(f"Experts4bit: x: expected dtype float32, float16 or bfloat16, got {x.dtype}")
    y: Tensor = ops.linear_4bit_dgrad(x, *other.weight, other.columns)  # x @ W is what F.linear's backward computes
    for a, b, scaling in zip(other.A, other.B, other.scaling, strict=True):
        y = y + F.linear(F.linear(x, a.to(x.dtype)), (b * scaling).to(x.dtype))
    return y


def _checked(x: Tensor, size: int) -> Tensor:
    if x.shape[-1:] != (size,):
        raise ValueError(f"Experts4bit: x: expected [..., {size}], got {list(x.shape)}")
    return cast_as_autocast(x)


PRODUCTS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
}


def fused_experts(module: nn.Module) -> list[str]:
    """The attributes in which a module of transformers has the weights of fused experts, if its own forward uses their
    matrices one by one: its `use_experts_implementation` marks those modules by attributes that it gives them."""
    if not (hasattr(module, "is_transposed") and hasattr(getattr(module, "config", None), "_experts_implementation")):
        return []
    own = module.named_parameters(recurse=False)
    return [name for name, weight in own if weight.dim() == 3 and weight.is_floating_point()]


def quantize_experts(module: Any, name: str, **options: Any) -> None:
    """Put Experts4bit in the place of such a weight. The module's own forward computes with them from now on."""
    weight = module.get_parameter(name)
    experts = Experts4bit(weight, is_transposed=module.is_transposed, **options).train(module.training)
    experts.replaced = name, module.config
    if not has_experts(module):
        module.register_forward_pre_hook(_begin)
        module.register_forward_hook(_end, always_call=True)
    # By the weight's own name, or one that holds it as a word, transformers would take them for it when it saves.
    module.add_module(f"quantized_{name}_", experts)
    module._parameters[name] = None  # its place among the others, by which PEFT knows it
    for each in module._parameters:
        if (key := f"quantized_{each}_") in module._modules:
            module._modules[key] = module._modules.pop(key)
    object.__setattr__(module, name, experts)
    module.config = copy.deepcopy(module.config)  # which other models may share
    module.config._experts_implementation = "eager"


def _begin(module: nn.Module, _: object) -> None:
    for experts in _replaced_in(module).values():
        experts.split = {}


def _end(module: nn.Module, *_: object) -> None:
    for experts in _replaced_in(module).values():
        experts.split = None


def _replaced_in(module: nn.Module) -> dict[str, Experts4bit]:
    found = {key: child for key, child in module.named_children() if isinstance(child, Experts4bit)}
    return {key: child for key, child in found.items() if child.replaced}


def has_experts(module: nn.Module) -> bool:
    """Whether some of its weights are in Experts4bit."""
    return any(isinstance(child, Experts4bit) for child in module.children())


def dequantize_experts(module: Any) -> None:
    """The inverse, for each weight that quantize_experts has replaced."""
    found = _replaced_in(module)
    for key, experts in found.items():
        name, _ = experts.replaced
        if module.__dict__.get(name) is experts:  # else it has been given another since
            weight = nn.Parameter(experts.dequantize(), requires_grad=False)
            del module.__dict__[name]
            module.register_parameter(name, weight)
        delattr(module, key)
    for experts in reversed(found.values()):
        module.config = experts.replaced[1]  # at last the one before all
    for hooks, own in ((module._forward_pre_hooks, _begin), (module._forward_hooks, _end)):
        for number in [number for number, hook in hooks.items() if hook is own]:
            del hooks[number]
            module._forward_hooks_always_called.pop(number, None)
