"""Fixtures for every folder: a real broker."""

pytest_plugins = ["bus.testing"]
