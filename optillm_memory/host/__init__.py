"""Optillm: the plugin, its routes, the launcher and the doctor."""
