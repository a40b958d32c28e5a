"""Calibration text by domain."""
