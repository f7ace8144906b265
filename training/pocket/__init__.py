"""The embedded models: a small Stable Diffusion and a small CLIP, trained from pictures that code draws."""
