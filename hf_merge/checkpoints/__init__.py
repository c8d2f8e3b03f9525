"""Files of tensors: on disk and on the Hub."""
