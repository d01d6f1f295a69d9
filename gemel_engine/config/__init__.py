"""The settings of all jobs, and reading a configuration."""
