"""Diffusion: noise schedules, parameterizations, samplers and random noise."""
