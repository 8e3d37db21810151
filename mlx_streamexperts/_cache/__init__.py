"""Which expert sits in which slot, and which one leaves. Pure Python and NumPy."""
