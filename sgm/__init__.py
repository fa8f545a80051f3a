"""Diffusion building blocks of CogVideoX: networks, conditioning, noise schedules and samplers."""

from sgm.lean_sat import leave_out_unused_parts

leave_out_unused_parts()
