"""The page beside a quantized model."""
