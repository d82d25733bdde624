"""Other people's formats: Hugging Face folders in and out, GGUF files out. No training and no text generation."""
