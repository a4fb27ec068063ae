"""Calibration: the data recipes, the samples drawn from them, and what is observed as they pass through a model."""
