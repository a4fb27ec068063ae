"""The numerics of 4-bit floating point, and of FP8 beside it, in pure torch: what every kernel is tested against."""
