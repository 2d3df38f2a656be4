"""Files: written whole or not at all, checked as they are read, and told from each other by their contents."""
