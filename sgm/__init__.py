"""Diffusion building blocks of CogVideoX: networks, conditioning, noise schedules and samplers."""
