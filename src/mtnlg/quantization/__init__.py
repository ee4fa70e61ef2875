"""Weights in few bits: linear layers over integers, and how the integers are chosen."""
