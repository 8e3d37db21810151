"""The streamed expert layer, its slots, and the stream behind a model."""
