"""What every room stands on: errors, registries, per-sample randomness, input checks, safe files."""
