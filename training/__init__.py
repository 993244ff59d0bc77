"""Trains, evaluates and exports the small Block Transformer that the server embeds as its default model."""
