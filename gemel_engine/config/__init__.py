"""Every setting of every job, and how a configuration is read."""
