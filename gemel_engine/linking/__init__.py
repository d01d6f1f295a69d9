"""The linking job."""
