"""Replies held to a shape: JSON, a JSON schema, or a tool call."""
