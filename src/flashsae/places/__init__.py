"""Where SAEs lie: folders, files and runs of any format, and the Hugging Face hub."""
