"""Code that linking and training share: corpus, output directory, stages, Ray Data."""
