"""What is computed: modules and pure functions. No I/O, no loops over data, no Hydra."""
