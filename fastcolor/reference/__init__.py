"""The operations in plain PyTorch: the definition, the oracle of every test, the last fallback."""
