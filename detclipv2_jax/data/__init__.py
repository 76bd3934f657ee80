"""Reading: raw files to host batches of NumPy arrays. Touches no device and imports no TensorFlow."""
