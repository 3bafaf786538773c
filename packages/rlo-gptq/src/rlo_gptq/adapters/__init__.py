"""LoRA adapters on a quantized model: begun at the quantization error, merged back."""
