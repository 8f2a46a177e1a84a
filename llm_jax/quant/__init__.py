"""Quantization: rules over names, calibration, and methods that choose scales and codes."""
