"""Diffusion: noise levels and their sampling, output scaling, guidance, samplers and the loss.

To read the code, start with discretizer, denoiser_scaling, denoiser, guiders and sampling; for
training, continue with sigma_sampling and loss. Names used in all of these modules:

- `timestep`: index 0..999 of a noise level of the training; 999 is the noisiest. The network is
  conditioned on the timestep.
- `step_index`: position 0..num_steps-1 in a sampling run; 0 is the noisiest.
- `alpha_cumprod_sqrt`: the noise level, expressed as the factor a of the signal in a noisy latent
  x_t = a x_0 + sqrt(1 - a^2) noise. 0 is pure noise.
"""
