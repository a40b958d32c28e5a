"""Scenarios, metrics and evaluation text."""
