"""Finding demonstrations for mentions."""
