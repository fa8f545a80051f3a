"""Training data: finding clips and captions, choosing frames, decoding, batches, the cache."""
