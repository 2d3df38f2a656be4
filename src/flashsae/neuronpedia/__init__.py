"""Latents of a run for Neuronpedia: what its client uploads, and the folder that it imports in bulk."""

from flashsae.neuronpedia.export import Asked as Asked
from flashsae.neuronpedia.export import export as export
