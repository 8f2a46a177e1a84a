"""Quantization: rules that select schemes by name, calibration, and methods that determine scales and codes."""
