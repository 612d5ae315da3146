"""Fine-tuning of causal language models, with LoRA, QLoRA or whole: `python -m qlora_ext.finetune --help`."""
