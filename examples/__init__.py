"""Short scripts that use the modules as a library, without a configuration."""
