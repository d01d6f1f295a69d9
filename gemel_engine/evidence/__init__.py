"""What is known of entities beside the language model: names, aliases, descriptions and pictures, made searchable."""
