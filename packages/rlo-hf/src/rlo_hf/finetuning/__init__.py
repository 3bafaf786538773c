"""`rlo-hf finetune`: text to a finetuned model."""
