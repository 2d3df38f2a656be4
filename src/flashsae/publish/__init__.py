"""Runs for others: a folder with a model card, pushed to the Hugging Face hub."""
