"""JSON and tensor messages, to arrays and back."""
