"""What sampling needs around the model: prompts, video files, progress."""
