"""What the compiled kernel does, without a GPU: counted and simulated."""
