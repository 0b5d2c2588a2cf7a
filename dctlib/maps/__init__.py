"""Differentiable maps: their values, products and derivatives."""
