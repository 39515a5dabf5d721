"""A server of SavedModels that speaks TensorFlow Serving's protocol, and a client for it."""
