"""Fine-tune a language model in 4 bits with PEFT's LoRA in a loop of your own, and let it answer the first prompt.

Run: python plain_loop.py --model FOLDER --data FILE.jsonl --output FOLDER --steps 60
It needs transformers, peft and datasets, and a model with a chat template.
A line of the data is {"prompt": "...", "completion": "..."}.
"""

import argparse
import itertools

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers import BitsAndBytesConfig  # isort: skip

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="folder of the model, or its name on the hub")
parser.add_argument("--data", required=True, help="JSON lines")
parser.add_argument("--output", required=True, help="folder for the adapter")
parser.add_argument("--steps", type=int, default=60, help="default: %(default)s")
arguments = parser.parse_args()
torch.manual_seed(0)

quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16")  # fmt: skip # noqa: E501
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
base = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=quantization, dtype=torch.bfloat16)
model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
model.print_trainable_parameters()

rows = list(load_dataset("json", data_files=arguments.data, split="train"))
questions = [[{"role": "user", "content": row["prompt"]}] for row in rows]
chats = [[*q, {"role": "assistant", "content": row["completion"]}] for q, row in zip(questions, rows, strict=True)]
loader = torch.utils.data.DataLoader(chats, batch_size=8, shuffle=True, collate_fn=list)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
model.train()
for step, chat in enumerate(itertools.islice(itertools.cycle(loader), arguments.steps), start=1):
    batch = tokenizer.apply_chat_template(chat, padding=True, return_dict=True, return_tensors="pt").to(model.device)
    loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
model.save_pretrained(arguments.output)

model.eval()
question = tokenizer.apply_chat_template(
    questions[0], add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
print(tokenizer.decode(model.generate(**question, max_new_tokens=40)[0]))
