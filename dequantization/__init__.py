"""Dequantization: noise that turns integer grey levels into a density, fixed or learned."""
