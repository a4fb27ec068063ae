"""Quantization methods: functions from a weight to its canonical triple. They know no models, files or devices."""
