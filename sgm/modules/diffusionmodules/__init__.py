"""One file per question of a diffusion model: noise levels, their draw, scaling, guidance, steps.

Reading order: discretizer, denoiser_scaling, denoiser, guiders, sampling; for training then
sigma_sampling and loss. Names used throughout:

- `timestep`: index 0..999 into the noise levels the model was trained on, 999 the noisiest; what
  the network is conditioned on.
- `step_index`: position 0..num_steps-1 in a sampling run, 0 the noisiest.
- `alpha_cumprod_sqrt`: the signal's share of a noisy latent, x_t = a x_0 + sqrt(1 - a^2) noise.
"""
