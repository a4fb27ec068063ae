"""On-disk formats: one module each, functions between a layer's stored tensors and the canonical form."""
