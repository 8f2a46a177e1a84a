"""Quantization: rules over names, calibration, and methods that determine scales and codes."""
