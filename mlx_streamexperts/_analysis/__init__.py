"""Predicting and measuring speed, replaying routing, comparing with stock."""
