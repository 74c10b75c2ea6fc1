"""Evaluators: metrics that are never trained on."""
