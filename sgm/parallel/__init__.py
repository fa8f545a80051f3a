"""Several processes make one video: they divide guidance, tokens and decoding."""
