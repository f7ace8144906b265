"""The embedded models: small Stable Diffusion and CLIP checkpoints, trained here from pictures drawn by code."""
