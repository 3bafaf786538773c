"""GGUF files, which llama.cpp, Ollama and LM Studio run: grids, packers, metadata and writer."""
