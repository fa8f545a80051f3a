"""Diffusion building blocks of CogVideoX: networks, conditioning, noise schedules and samplers.

With it SAT is imported in part only; see sgm/lean_sat.py.
"""

from sgm.lean_sat import leave_out_unused_parts

leave_out_unused_parts()
