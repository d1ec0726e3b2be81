"""Weights in the layouts that operators read, and the file that holds them."""
