"""Results remembered, sweeps, Ray."""
