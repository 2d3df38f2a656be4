"""Text: the documents of files, folders, lists and data sets, and the order in which they are read."""
