"""Texts and pictures from a trained model: the training model's own modules, with the keys and values of what was read
kept. No second model; nothing here trains or scores."""
