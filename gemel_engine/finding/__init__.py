"""Finding the mentions of documents."""
