"""Train a language model in 4 bits on preferences with TRL's DPOTrainer: without its adapter it is its own reference.

Run: python dpo.py --model FOLDER --data FILE.jsonl --output FOLDER --steps 60
It needs trl and peft. A line of the data is what TRL takes, {"prompt": ..., "chosen": ..., "rejected": ...}.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from transformers import BitsAndBytesConfig  # isort: skip

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="folder of the model, or its name on the hub")
parser.add_argument("--data", required=True, help="JSON lines")
parser.add_argument("--output", required=True, help="folder for the adapter")
parser.add_argument("--steps", type=int, default=60, help="default: %(default)s")
arguments = parser.parse_args()

quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16")  # fmt: skip # noqa: E501
trainer = DPOTrainer(
    arguments.model,
    args=DPOConfig(
        output_dir=arguments.output,
        max_steps=arguments.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-5,
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        model_init_kwargs={"dtype": "bfloat16"},
    ),
    train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
    quantization_config=quantization,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
