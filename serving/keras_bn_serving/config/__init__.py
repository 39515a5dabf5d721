"""What a person sets: flags, configuration files, the models to serve."""
