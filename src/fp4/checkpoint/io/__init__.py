"""Checkpoint folders: safetensors headers, files written whole, models of the hub, and work in progress."""
