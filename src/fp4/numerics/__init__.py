"""The numerics of the 4-bit formats and of FP8 in pure torch. Every kernel is tested against them, bit by bit."""
