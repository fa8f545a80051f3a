"""What a configuration builds whole: the diffusion transformer and the video autoencoder."""
