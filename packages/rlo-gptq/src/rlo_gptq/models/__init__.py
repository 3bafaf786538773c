"""The model on disk and in blocks: where its weights come from and how it is laid out."""
