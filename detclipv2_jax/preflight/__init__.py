"""Steps compiled for accelerators that are not there: their memory, arithmetic and traffic; and a check of the data."""
