"""Encoders of what a sample is conditioned on."""
