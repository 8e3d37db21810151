"""The APIs that the server speaks: each is a translator to and from one request for a chat."""
