"""Parts of the 3D causal video autoencoder. Tensors are (b, c, t, h, w) throughout."""
