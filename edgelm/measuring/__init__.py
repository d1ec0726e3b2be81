"""What `edgelm bench` measures: several bundles and settings side by side, and energy."""
