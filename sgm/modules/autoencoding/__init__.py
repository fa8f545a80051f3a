"""Parts of the 3D causal video autoencoder. All feature maps are (b, c, t, h, w)."""
