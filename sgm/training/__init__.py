"""What training needs beside the model: checks of its settings."""
