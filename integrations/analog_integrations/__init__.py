"""Integrations: analog-plugin inside other tools, one folder a host."""
