"""Texts and pictures from a trained model: the training model's own modules, with the keys and values of what was read
kept. No second model; nothing here trains or scores."""

from megabagel.inference.flow import FlowSettings
from megabagel.inference.generator import Generator
from megabagel.inference.guidance import Guidance
from megabagel.inference.load import load
from megabagel.inference.text import TextSettings

__all__ = ["FlowSettings", "Generator", "Guidance", "TextSettings", "load"]
