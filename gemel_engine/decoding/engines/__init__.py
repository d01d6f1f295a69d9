"""What answers the rollouts of the search."""
