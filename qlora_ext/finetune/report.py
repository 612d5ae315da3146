"""The result of a run: what the model is made of, the table, report.json and report.png."""

import json
import math
import resource
import sys
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from qlora_ext.dense_linear import is_dense_linear
from qlora_ext.weight_4bit import Weight4bit
from qlora_ext.whole_files import write_files

MIB = 2**20


def composition(model: PreTrainedModel, *, adapter: bool) -> dict[str, Any]:
    """Count parameters and bytes of a model.

    Returns: total and trainable parameters, as elements (a packed byte counts as the two weights it holds); bytes
    of the base (all parameters and buffers but the adapter's) and of the adapter; bits a weight of the base's
    linears, scales included, the output head left out.
    """
    parameters = list(model.parameters())  # a tied parameter comes once
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    adapter_bytes = _bytes(trainable) if adapter else 0
    total = sum(parameter.numel() for parameter in parameters)
    head = model.get_output_embeddings()
    weights = stored_bytes = 0
    for module in model.modules():
        if isinstance(module, Weight4bit):
            elements = module.in_features * module.out_features
            total += elements - module.weight.numel() - module.absmax.numel()
            stored = [module.weight, module.absmax, module.nested_absmax, module.nested_offset]
            stored_bytes += _bytes(tensor for tensor in stored if tensor is not None)
        elif is_dense_linear(module) and module is not head:
            elements = module.weight.numel()
            stored_bytes += module.weight.nbytes
        else:
            continue
        weights += elements
    trained = sum(parameter.numel() for parameter in trainable)
    return {
        "total_parameters": total,
        "trainable_parameters": trained,
        "trainable_percent": 100 * trained / total,
        "base_bits": 8 * stored_bytes / weights if weights else None,
        "base_bytes": _bytes([*parameters, *model.buffers()]) - adapter_bytes,
        "adapter_bytes": adapter_bytes,
    }


def peak_rss() -> int:
    """The largest resident memory of this process so far, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent held before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(report: dict[str, Any]) -> str:
    """The result as lines of text: one row of figures, then the sample answers before and after."""
    before, after = report["held_out_loss_before"], report["held_out_loss_after"]
    change = f"{before:.3f} -> {after:.3f}" if before is not None else "none held out"
    if before:
        change += f" ({after / before - 1:+.1%})"
    row = {
        "method": report["method"],
        "base bits": f"{report['base_bits']:.3f}" if report["base_bits"] else "-",
        "trainable": f"{report['trainable_parameters']:,} ({report['trainable_percent']:.2f} %)",
        "base MiB": f"{report['base_bytes'] / MIB:.1f}",
        "peak RSS MiB": f"{report['peak_rss_bytes'] / MIB:.0f}",
        "tokens/s": f"{report['tokens_per_second']:.0f}" if report["tokens_per_second"] else "-",
        "held-out loss": change,
    }
    widths = [max(len(name), len(value)) for name, value in row.items()]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(part, widths, strict=True)) for part in (row, row.values())
    ]
    lines += [
        _states_line(report["optimizer"]),
        "base bits: stored bits a weight of the linear layers, scales included",
        "tokens/s: input tokens without padding, over the time in training steps (forward, backward, optimizer)",
        "held-out loss: mean over answer tokens, in nats",
    ]
    for sample in report["samples"]:
        lines += ["", f"prompt:    {sample['prompt']}", f"reference: {sample['reference']}"]
        lines += [f"before:    {sample['before']}", f"after:     {sample['after']}"]
    return "\n".join(lines)


def write(report: dict[str, Any], folder: Path) -> None:
    """Write report.json and report.png (loss curve; memory of each part) into `folder`."""
    text = json.dumps(_no_nan(report), indent=2, ensure_ascii=False, allow_nan=False)
    figure = Figure(figsize=(11, 4), layout="constrained")
    curve, memory = figure.subplots(1, 2)

    losses = report["losses"]
    curve.plot(range(1, len(losses) + 1), losses, label="training", linewidth=1)
    held_out = [tuple(point) for point in report["held_out_losses"]]
    if report["held_out_loss_before"] is not None:
        held_out = [
            (0, report["held_out_loss_before"]),
            *held_out,
            (report["step"], report["held_out_loss_after"]),
        ]
        curve.plot(*zip(*held_out, strict=True), "o-", label="held out")
    curve.set(xlabel="step", ylabel="loss, nats per answer token", title=f"{report['method']}: loss")
    curve.legend()

    parts = {"base": report["base_bytes"], "adapter": report["adapter_bytes"]}
    if report["optimizer_bytes"] is not None:
        states = report["optimizer"]
        parts |= {
            "gradients": report["gradient_bytes"],
            "optimizer": report["optimizer_bytes"] - states["file_bytes"] + states["ring_bytes"],
            "optimizer, in a file": states["file_bytes"],
        }
    parts["peak RSS"] = report["peak_rss_bytes"]
    bars = memory.barh(list(parts), [size / MIB for size in parts.values()])
    memory.bar_label(bars, fmt="%.1f", padding=3)
    memory.margins(x=0.15)
    memory.invert_yaxis()
    memory.set(xlabel="MiB", title="memory")

    drawn = BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    # report.json last: it says that the run is done.
    write_files(
        {
            folder / "report.png": lambda path: path.write_bytes(drawn.getvalue()),
            folder / "report.json": lambda path: path.write_bytes((text + "\n").encode()),
        }
    )


def _no_nan(value: Any) -> Any:
    """The same with None, JSON's null, for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _no_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_no_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _states_line(optimizer: dict[str, Any]) -> str:
    """Where the states of the optimizer were, and what moved."""
    if optimizer["moved_bytes"] is None:
        return f"optimizer: {optimizer['kind']}, states: not seen, as all steps had been made before --resume"
    places = {"on the device": "device_bytes", "in host memory": "host_bytes", "in the page file": "file_bytes"}
    held = [f"{optimizer[key] / MIB:.1f} MiB {place}" for place, key in places.items() if optimizer[key]]
    line = f"optimizer: {optimizer['kind']}, states: {', '.join(held) or 'none'}"
    if optimizer["moved_bytes"]:
        line += f"; {optimizer['moved_bytes'] / MIB:.0f} MiB moved through {optimizer['ring_bytes'] / MIB:.1f} MiB, "
        line += f"{optimizer['hit_rate']:.0%} of pages not moved, {optimizer['seconds_waited']:.1f} s waited"
    return line


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
