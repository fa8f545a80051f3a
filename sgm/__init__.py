"""Diffusion building blocks of CogVideoX: networks, conditioning, noise schedules and samplers.

With it SAT is imported in part only; see sgm/sat_runtime.py.
"""

from sgm.sat_runtime import leave_out_unused_parts

leave_out_unused_parts()
