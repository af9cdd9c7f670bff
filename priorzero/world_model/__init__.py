"""The latent world model: UniZero's network on text embeddings, its losses, and its inference for
search.
"""
