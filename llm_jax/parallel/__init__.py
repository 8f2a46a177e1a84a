"""Devices as a mesh, and which axis of it each weight is split over."""
