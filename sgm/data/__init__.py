"""Training data: clips of folders, their frames, decoding in separate processes, the cache."""
