"""Diffusion: noise levels and their sampling, output scaling, guidance, samplers and the loss.

Reading order: discretizer, denoiser_scaling, denoiser, guiders, sampling; for training then
sigma_sampling and loss. Names used throughout:

- `timestep`: index 0..999 into the noise levels of training, 999 the noisiest. The network is
  conditioned on it.
- `step_index`: position 0..num_steps-1 in a sampling run, 0 the noisiest.
- `alpha_cumprod_sqrt`: the noise level, given as the factor a of the signal in a noisy latent,
  x_t = a x_0 + sqrt(1 - a^2) noise. 0 is pure noise.
"""
