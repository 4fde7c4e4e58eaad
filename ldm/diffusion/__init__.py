"""Diffusion as tensor maths over one contract: denoise(x, sigma, **cond) -> x0 for x = x0 + sigma * noise."""
