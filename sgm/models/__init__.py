"""The models: the diffusion transformer and the video autoencoder."""
