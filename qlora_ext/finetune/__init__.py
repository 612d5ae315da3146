"""Fine-tuning of causal language models with LoRA or QLoRA: `python -m qlora_ext.finetune --help`."""
