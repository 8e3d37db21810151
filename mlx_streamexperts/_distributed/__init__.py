"""One model on several machines: each rank's layers, and the messages between ranks."""
