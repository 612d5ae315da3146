"""The methods of fine-tuning, and the options that each does without."""

METHODS = ("qlora", "lora", "full")

READ_BY = {
    ("qlora", "lora"): ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"),
    ("qlora",): ("quant_type", "blocksize", "no_double_quant", "skip"),
}


def unread_by(method: str) -> list[str]:
    """The options of other methods."""
    return [name for methods, names in READ_BY.items() if method not in methods for name in names]
