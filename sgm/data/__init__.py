"""Training data: layouts of folders, clips and their frames, decoding in processes of its own."""
