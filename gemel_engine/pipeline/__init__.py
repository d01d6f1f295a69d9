"""What linking and training share: corpus, output, stages."""
