"""The HTTP API and the chat page over the generation engine."""
