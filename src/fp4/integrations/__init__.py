"""Integrations with libraries that load and run models."""
