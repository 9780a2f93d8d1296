"""The LLaVA family."""
