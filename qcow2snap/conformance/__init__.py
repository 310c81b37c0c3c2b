"""Conformance: what the specification asks of an image, and what this image does. Reads; never writes."""
