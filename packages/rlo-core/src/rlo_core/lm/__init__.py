"""Language modelling text: files and data sets, documents, tokens, windows, perplexity."""
