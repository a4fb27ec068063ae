"""Checkpoint formats: one codec a file, between a layer's stored tensors and the quantized tensor."""
