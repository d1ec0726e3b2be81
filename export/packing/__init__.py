"""Pack weights into the layouts that operators read, and write the weights file."""
