"""What it takes to load a model into 4 bits, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MEASURE = """
import sys, threading, torch
from qlora_ext.finetune.load import load_model, open_checkpoint
from transformers import LlamaForCausalLM

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

before = anonymous()
peak, done = [before], threading.Event()
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
quantize = {"quant_type": "nf4", "blocksize": 64, "double_quant": True}
model = load_model(open_checkpoint(sys.argv[1]), dtype=torch.bfloat16, device=torch.device("cpu"), quantize=quantize)
done.set()
watcher.join()
tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
print(peak[0] - before, sum(tensors.values()))
"""


def measure(source: Path) -> tuple[int, int]:
    """Load a folder or file into NF4 and bfloat16; return by how many bytes memory grew at most, and the model's."""
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source)], check=True, capture_output=True, text=True, timeout=120
    )
    growth, model = map(int, child.stdout.split())
    return growth, model
