"""Sampling and decoding of one video by several processes."""
