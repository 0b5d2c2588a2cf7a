"""Steering vectors to and from other tools."""
